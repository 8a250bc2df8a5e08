"""What a version says about itself: numbers, the page that shows them, the card for the Hub."""

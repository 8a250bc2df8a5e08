"""Where rows come from: files, the Hub, other recipes' versions."""

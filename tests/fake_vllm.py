"""A program that takes the command line of vLLM's server and does what $FAKE says."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
given = dict(arg[2:].split("=", 1) for arg in sys.argv[3:] if "=" in arg)
does = json.loads(os.environ.get("FAKE", "{}"))
print("server", os.getpid(), flush=True)
for line in does.get("says", []):
    print(line, flush=True)
if does.get("worker"):
    # A child that takes no notice of SIGTERM, as a stuck worker would.
    stuck = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", stuck])
    print("worker", worker.pid, flush=True)
if does.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "marker" in does:
    # Ends at its start if this is not its first.
    if Path(does["marker"]).exists():
        sys.exit(7)
    Path(does["marker"]).touch()
if "exits" in does:
    sys.exit(does["exits"])
time.sleep(does.get("loads_s", 0))


def journal(event, **more):
    """One line, written at once, so that several servers may share the file."""
    if "journal" in does:
        line = json.dumps({"event": event, "pid": os.getpid(), "model": given["model"]} | more)
        with Path(does["journal"]).open("ab", 0) as file:
            file.write(line.encode() + b"\n")


def down(*args):
    journal("down")
    os._exit(0)


if "journal" in does:
    signal.signal(signal.SIGTERM, down)
came = []
counting = threading.Lock()


def written(body):
    """What a writer would say, or a judge, who likes what comes later in the alphabet."""
    said = body["messages"][-1]["content"]
    if "response_format" not in body:
        return given["model"].rpartition("/")[2] + " on " + said[:40]
    one, two = (said.split(f"<answer_{x}>")[1].split("</answer_")[0] for x in "ab")
    verdict = "tie" if one == two else "A" if one > two else "B"
    return json.dumps({"reason": "It is.", "verdict": verdict})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(503 if does.get("sick") else 200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        if said == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(does.get("takes_s", 0))
        with counting:
            came.append(said)
            if does.get("dies_at") == len(came) and not Path(does.get("grave", "none")).exists():
                if "grave" in does:
                    Path(does["grave"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        journal("asked", body=body)
        if does.get("refuses", "nothing") in said:
            error = {"message": "maximum context length is 9 tokens"}
            self.reply(400, {"error": error})
            return
        known = body["model"] == given["served-model-name"]
        seen = {"pid": os.getpid(), "env": dict(os.environ), "argv": sys.argv}
        content = written(body) if does.get("writes") else json.dumps(seen)
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 3}
        self.reply(200 if known else 404, {"choices": [choice], "usage": usage})

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer((given["host"], int(given["port"])), Handler)
journal("up", gpus=os.environ["CUDA_VISIBLE_DEVICES"])
server.serve_forever()

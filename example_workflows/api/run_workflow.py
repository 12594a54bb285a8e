"""Run an API-format workflow on a ComfyUI server: set inputs, queue, follow the progress, fetch the files.

    python run_workflow.py wan_i2v.json --upload Photo=boat.jpg --set "Wan I2V Sampler.positive=The boat drifts."

Nodes go by their titles. Needs websocket-client, and nothing of this pack.
"""

import argparse
import json
import sys
import uuid
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import websocket


def call(url, body=None, kind="application/json"):
    with urlopen(Request(url, body, {"Content-Type": kind})) as answer:
        return answer.read()


def upload(server, picture):  # into ComfyUI's input folder; returns its name there
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{picture.name}"\r\n\r\n'
    body = head.encode() + picture.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    return json.loads(call(f"{server}/upload/image", body, f"multipart/form-data; boundary={boundary}"))["name"]


def set_input(prompt, where, value):  # where: "Title.input"
    title, _, name = where.rpartition(".")
    nodes = [node for node in prompt.values() if node["_meta"]["title"] == title and name in node["inputs"]]
    if len(nodes) != 1:
        sys.exit(f"{len(nodes)} nodes are called {title!r} and have an input {name!r}; there must be one.")
    nodes[0]["inputs"][name] = value if isinstance(nodes[0]["inputs"][name], str) else json.loads(value)


def run(server, prompt):  # returns the files it made
    client_id, files = uuid.uuid4().hex, []
    socket = websocket.create_connection(f"{server.replace('http', 'ws', 1)}/ws?clientId={client_id}")
    body = json.dumps({"prompt": prompt, "client_id": client_id}).encode()
    try:
        prompt_id = json.loads(call(f"{server}/prompt", body))["prompt_id"]
    except HTTPError as error:
        sys.exit(f"ComfyUI refuses the workflow: {error.read().decode()}")
    while True:
        message = socket.recv()
        # Bytes are a live picture: an animated PNG behind 8 of them.
        kind, data = ("picture", {}) if isinstance(message, bytes) else map(json.loads(message).get, ("type", "data"))
        if kind == "wan_sharded.status":
            print(data["text"])
        elif not isinstance(data, dict) or data.get("prompt_id") != prompt_id:  # other prompts', other packs' messages
            continue
        elif kind == "executed":
            files += data["output"].get("images", [])
        elif kind == "execution_success":
            return files
        elif kind in ("execution_error", "execution_interrupted"):
            sys.exit(f"{kind}: {data.get('exception_message', '')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--set", action="append", default=[], metavar="TITLE.INPUT=VALUE")
    parser.add_argument("--upload", action="append", default=[], metavar="TITLE=FILE")
    arguments = parser.parse_args()
    prompt = json.loads(arguments.workflow.read_text(encoding="utf-8"))
    for where, value in (item.split("=", 1) for item in arguments.set):
        set_input(prompt, where, value)
    for title, picture in (item.split("=", 1) for item in arguments.upload):
        set_input(prompt, f"{title}.image", upload(arguments.server, Path(picture)))
    for file in run(arguments.server, prompt):
        where = urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
        target = Path(Path(file["filename"]).name)  # here, whatever the server calls it
        target.write_bytes(call(f"{arguments.server}/view?{where}"))
        print(f"written: {target}")


if __name__ == "__main__":
    main()

"""The process of a binding with one fault: ``python binding_child.py FAULT FILE``.

It notes in the file each time that it starts. A fault of a call is one of the first start alone.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

call = {}
"""The one that is being answered."""

HELLO = {"protocol": 1, "name": "child", "version": "1", "members": ["match_targets", "forward"]}
HELLO["missing"] = {"bind": "it has no cards"}
HELLOS = {
    "another protocol": {**HELLO, "protocol": 2},
    "no name": {key: value for key, value in HELLO.items() if key != "name"},
    "members are a number": {**HELLO, "members": 3},
    "domains are a number": {**HELLO, "domains": 3},
    "failures without reasons": {**HELLO, "expected_failures": {"R3.11": "it differs"}},
}


def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def outcome(**kind):
    say(json.dumps({"id": call["id"], **kind}) + "\n")


def array(dtype, shape, data):
    outcome(ok={"array": {"dtype": dtype, "shape": shape, "data": data}})


def die():
    sys.stderr.write("Segfault in layer 3\n")
    os._exit(3)


def endless():
    block = "x" * 2**20
    while True:
        say(block)


def closed():
    os.close(1)
    time.sleep(60)


def flood():
    while True:
        say("Loading weights …\n" * 2**16)


FAULTS = {
    "prints without end": flood,
    "prints": lambda: say("Loading weights …\n"),
    "dies": die,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is silent": lambda: time.sleep(60),
    "half a line": lambda: (say('{"id": 1, "o'), os._exit(0)),
    "an endless line": endless,
    "closes its output": closed,
    "no JSON": lambda: say("{]\n"),
    "no text": lambda: (sys.stdout.buffer.write(b"\xff\n"), sys.stdout.flush()),
    "no message": lambda: say("[1]\n"),
    "too deep": lambda: say("[" * 10**6 + "\n"),
    "another id": lambda: say('{"id": 99, "ok": []}\n'),
    "NaN": lambda: say(f'{{"id": {call["id"]}, "ok": [NaN]}}\n'),
    "no outcome": outcome,
    "no kind": lambda: outcome(ok={}),
    "an unknown kind": lambda: outcome(ok={"tensor": []}),
    "another type": lambda: outcome(ok=1.5),
    "an object": lambda: outcome(ok={"handle": 1}),
    "half a card": lambda: outcome(ok={"card": {"name": "a", "target_modules": []}}),
    "a shape that does not fit": lambda: array("float32", [2, 2], "AAAAAA=="),
    "a negative shape": lambda: array("float32", [-1, -1], "AAAAAA=="),
    "an unknown dtype": lambda: array("object", [1], "AAAAAA=="),
    "no base64": lambda: array("float32", [1], "AAAA AA=="),
    "an unknown callback": lambda: say('{"callback": 7, "args": []}\n'),
}


def start(fault, notes_file):
    with notes_file.open("a") as notes:
        notes.write("started\n")
    if fault == "dies at start":
        die()
    elif fault == "is silent at start":
        time.sleep(60)
    elif fault == "does not read":
        say(json.dumps({"hello": HELLO}) + "\n")
        if notes_file.read_text() == "started\n":
            time.sleep(60)
    elif fault == "prints at start":
        say("Loading weights …\n")
    if fault != "does not read":
        say(json.dumps({"hello": HELLOS.get(fault, HELLO)}) + "\n")


def main(fault, notes_file):
    start(fault, notes_file)
    is_first = notes_file.read_text() == "started\n"
    for line in sys.stdin:
        call.clear()
        call.update(json.loads(line))
        if fault in FAULTS and is_first:
            FAULTS[fault]()
        elif fault == "all" and call["args"]["names"][0] in FAULTS:
            FAULTS[call["args"]["names"][0]]()
        elif fault == "dies at heads" and "all-linear" in call["args"]["targets"]:
            die()
        else:
            names, targets = call["args"]["names"], call["args"]["targets"]
            outcome(ok=[n for n in names if any(f".{n}".endswith(f".{t}") for t in targets)])
            if fault == "says more" and is_first:
                say("done\n")
    notes_file.write_text(notes_file.read_text() + "closed\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

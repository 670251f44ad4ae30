"""Reading hostile files: in a process with little memory that records what runs, and mutated while one watches."""

from __future__ import annotations

import encodings.cp437  # noqa: F401  zipfile imports it for names that are no UTF-8
import json
import subprocess
import sys
import time

from fanal.errors import FanalError
from toys import environment

GUARDED = """
import encodings.cp437, importlib, json, resource, sys, time
from pathlib import Path
from fanal.errors import FanalError

folder, module, name, form = Path(sys.argv[1]), *sys.argv[2:]
read = getattr(importlib.import_module(module), name)
answers, seen = {}, []
read(form.format(folder / "good"))  # whatever is imported late is imported now
x = Path("/proc/self/statm").read_text().split()[0]
limit = int(x) * resource.getpagesize() + 768 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
names = ("exec", "compile", "import", "os.", "subprocess.", "pickle.", "marshal.", "socket.", "ctypes.dlopen")

def watch(event, arguments):
    if event.startswith(names) or event == "open" and arguments[1] not in ("rb", "r", None):
        seen.append([event, repr(arguments)[:200]])

files = sorted(folder.iterdir())
sys.addaudithook(watch)
for file in files:
    start = time.process_time()
    try:
        read(form.format(file))
        answer = "loaded"
    except FanalError as error:
        answer = "refused" if len(str(error)) < 2000 else "long"
    except BaseException as error:
        answer = type(error).__name__
    answers[file.name] = [answer, time.process_time() - start]
events, seen = list(seen), []
print(json.dumps({"answers": answers, "events": events}))
"""


def guarded(folder, good, module, name, form="{}"):
    """Read every file of a folder in a process with little memory that records what the interpreter executes.

    `good` is a file that loads; `module.name` is the reader, called with `form` filled with the file's path.
    """
    (folder / "good").write_bytes(good)
    code = [sys.executable, "-W", "ignore", "-c", GUARDED, str(folder), module, name, form]
    done = subprocess.run(code, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def mutated(raw, source):
    """One to four changes: a byte, a bit, a piece cut out, doubled or moved, numbers of the extreme kind."""
    data = bytearray(raw)
    for _ in range(source.randint(1, 4)):
        at, many = source.randrange(len(data)), source.randint(1, 64)
        choice = source.randrange(7)
        if choice == 0:
            data[at] = source.randrange(256)
        elif choice == 1:
            data[at] ^= 1 << source.randrange(8)
        elif choice == 2:
            del data[at : at + many]
        elif choice == 3:
            data[at:at] = data[at : at + many]
        elif choice == 4:
            data[at : at + 4] = source.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
        elif choice == 5:
            there = source.randrange(len(data))
            data[at : at + many] = data[there : there + many]
        else:
            data[at] = source.choice(b"RbQcioe(tust0\x81\x82\x92\x93\x94h")
    return bytes(data)


EVENTS = []


def _watch(event, arguments):
    if EVENTS and event in ("exec", "os.system", "subprocess.Popen", "os.exec", "pickle.find_class", "marshal.loads"):
        EVENTS.append(event)


def watched(act):
    """Call `act` while the interpreter reports whatever it executes; nothing may be reported."""
    if "hooked" not in globals():
        sys.addaudithook(_watch)
        globals()["hooked"] = True
    EVENTS.append("on")
    try:
        result = act()
    finally:
        seen = EVENTS[1:]
        EVENTS.clear()
    assert seen == [], seen
    return result


def refusals(read, path, files):
    """Read each of the files; how many were refused. Anything else than loading or FanalError fails."""
    count = 0
    for i, file in enumerate(files):
        path.write_bytes(file)
        start = time.process_time()
        try:
            read(path)
        except FanalError:
            count += 1
        assert time.process_time() - start < 10, i
    return count

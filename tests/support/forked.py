"""Our Python programs in processes forked from one that has imported torch, transformers and DeepSpeed: 0.1 s, not 6 s.

For tests of what a stage computes. Tests about starting, ending and killing processes start the real commands.

A forked process runs what `python -m MODULE ARGUMENTS` would run, in a session of its own. Where that starts ranks
through DeepSpeed's launcher they are forked too; when one fails the others are ended. Nothing else differs: no code of
the package knows of this.
"""

import atexit
import base64
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import psutil

from ropeway.runtime.launcher import free_port
from tests.support.processes import kill_all

LAUNCHER = "deepspeed.launcher.launch"
TERM_SECONDS = 30  # what is left of the other ranks is killed then, as DeepSpeed's launcher does
HEAVY = ("ropeway.stages.train.rank", "ropeway.orchestration.stage_process", "ropeway.cli.main")
AT_START = (  # what deepspeed.initialize imports
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject", "setuptools", "torch.utils.cpp_extension",
)  # fmt: skip
_run = subprocess.run
_nursery = None


def run(command, *, cwd=None, env=None, check=False, input="", **_options):  # noqa: A002 - as subprocess.run has it
    """Run `[python, "-m", module, …]` to its end in a forked process; return its CompletedProcess, output in one text.

    The output is printed too, so that it stands beside a failure of the test.
    """
    request = {
        "words": [str(word) for word in command[1:]],
        "cwd": str(cwd or Path.cwd()),
        "env": dict(env or os.environ),
        "input": input,
    }
    code, text = _server().ask(request)
    print(text)
    assert not (check and code)
    return subprocess.CompletedProcess(command, code, stdout=text, stderr="")


def run_ranks(module, *arguments, ranks, env=None):
    """Run a module as that many ranks, to their end; return what they printed."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    done = run([sys.executable, "-m", LAUNCHER, *options, module, *arguments], env=env)
    assert done.returncode == 0, done.stdout
    return done.stdout


class _Server:
    """The process that imported everything; ends with this one."""

    def __init__(self):
        # One thread: a process with several cannot be forked safely. Forked ones set the number they are asked for.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)

    def close(self):
        """End it and what was forked from it; at the end of the session there is nothing else."""
        family = psutil.Process(self.process.pid)
        kill_all([*family.children(recursive=True), family])
        self.process.communicate()

    def ask(self, request):
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as out:
            try:
                print(json.dumps(request | {"out": out.name}), file=self.process.stdin, flush=True)
                return int(self.process.stdout.readline()), out.read()
            except BaseException:  # the test's time is up: the next one gets a server of its own
                _server.cache_clear()
                atexit.unregister(self.close)
                self.close()
                raise


@functools.cache
def _server():
    return _Server()


# The server's side


def _serve():
    import importlib

    import transformers

    _ = transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    for name in HEAVY:
        importlib.import_module(name)
    from ropeway.stages.train.deepspeed_config import without_compiler

    with without_compiler({}):
        for name in AT_START:
            importlib.import_module(name)
    gc.freeze()  # no forked process walks what was imported
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import started a thread: forked processes would hang"
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()
            _enter(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _enter(request):
    """In the forked process: take the request's place on, then be the program."""
    with tempfile.TemporaryFile() as standard_input:
        standard_input.write(request["input"].encode())
        standard_input.seek(0)
        os.dup2(standard_input.fileno(), 0)
    out = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(request["cwd"])
    if request["words"][:2] == ["-m", LAUNCHER]:
        os._exit(_launch(request["words"][2:], request["env"]))
    _start_nursery()
    _be(request["words"], request["env"])


def _start_nursery():
    """Fork what ranks are forked from: by the time they are started, the program that asks may have threads."""
    global _nursery
    _nursery, theirs = socket.socketpair()
    if child := os.fork():
        theirs.close()
        atexit.register(os.waitpid, child, 0)
        atexit.register(_nursery.close)
        return
    _nursery.close()
    with theirs.makefile("rw") as asked:
        for line in asked:
            print(_launch(*json.loads(line)), file=asked, flush=True)
    os._exit(0)


def _ask_nursery(*request):
    with _nursery.makefile("rw") as asked:
        print(json.dumps(request), file=asked, flush=True)
        return int(asked.readline())


def _be(words, environment):
    """Become `python WORDS`, and end as it does."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
    subprocess.run = _run_forked
    code = 0
    try:
        _, module, *arguments = words
        sys.argv = [module, *arguments]
        sys.modules.pop(module, None)  # `python -m` has it as __main__ alone
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    with suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run_forked(command, **options):
    """Stand in for `subprocess.run`: fork where a program of ours is started and its output is not asked for."""
    environment = options.get("env") or dict(os.environ)
    if command[:3] == [sys.executable, "-m", LAUNCHER]:
        return subprocess.CompletedProcess(command, _ask_nursery(command[3:], environment))
    return _run(command, **options)


def _launch(words, environment):
    """Start the ranks as DeepSpeed's launcher does; return the first code that is not 0, once all have ended."""
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    count = len(json.loads(base64.urlsafe_b64decode(options["world_info"]))["localhost"])
    program = [word for word in words if not word.startswith("--")]
    shared = {"MASTER_ADDR": options["master_addr"], "MASTER_PORT": options["master_port"], "WORLD_SIZE": str(count)}
    ranks = set()
    for rank in range(count):
        child = os.fork()
        if not child:
            _be(["-m", *program], {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        ranks.add(child)
    code, until = 0, None
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ranks.remove(child)
            if (ended := os.waitstatus_to_exitcode(status)) and not code:
                code, until = ended, time.monotonic() + TERM_SECONDS
                _signal(ranks, signal.SIGTERM)
        elif until and time.monotonic() > until:
            _signal(ranks, signal.SIGKILL)
        time.sleep(0 if child else 0.02)
    return code


def _signal(processes, number):
    for one in processes:
        with suppress(ProcessLookupError):
            os.kill(one, number)


if __name__ == "__main__":
    _serve()

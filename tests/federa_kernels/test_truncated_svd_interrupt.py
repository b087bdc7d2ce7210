"""Ctrl-C while C++ works: KeyboardInterrupt, soon, and nothing left running."""

import os
import signal
import subprocess
import sys
import time

import pytest

from federa_kernels.truncated_svd import cpu

# Noise hardly decays: each of these matrices takes a second or more, so that the signal comes between blocks of one.
SCRIPT = """
import threading, time
import torch
from federa_kernels import truncated_svd

torch.set_num_threads(THREADS)
many = [torch.randn(2000, 2000, generator=torch.Generator().manual_seed(0))] * 1000
print("begin", flush=True)
try:
    truncated_svd(many, 64, tol=1e-9, method="krylov")
except KeyboardInterrupt:
    before = time.process_time()
    time.sleep(0.3)
    print("idle" if time.process_time() - before < 0.1 else "busy", threading.active_count(), flush=True)
    found = truncated_svd(torch.eye(40), 3)  # and it works afterwards
    print("interrupted", float(found.S.sum()), flush=True)
"""


@pytest.mark.skipif(not cpu.available() or os.name != "posix", reason="needs the compiled module and SIGINT")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c(threads):
    script = SCRIPT.replace("THREADS", str(threads))
    # A process started in the background may inherit SIGINT ignored: the default handler is put back.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", heard + script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begin\n"
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output.splitlines() == ["idle 1", "interrupted 3.0"] and process.returncode == 0

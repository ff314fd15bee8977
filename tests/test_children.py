"""`nohup make test &` hands Ctrl-C down as ignored; the children of tests can be stopped by it."""

import fast_blas  # noqa: F401  isort: skip

import signal
import subprocess
import sys


def test_a_child_of_a_test_hears_ctrl_c():
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_so_it_does_where_the_tests_themselves_inherit_it_ignored():
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    line.append(f"{__file__}::test_a_child_of_a_test_hears_ctrl_c")
    done = subprocess.run(
        line,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout

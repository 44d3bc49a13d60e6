"""The doctor: run for real, and shown each illness that it should name together with the cure."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqdist import doctor
from vqdist.backends import build_ops


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    """Make a machine on which `import torch` takes a second."""
    monkeypatch.setattr(doctor, "_import_seconds", 1.0)


def lines_of(check) -> list[str]:
    return [str(finding) for finding in doctor.guarded(check)]


@pytest.fixture
def extensions(tmp_path, monkeypatch) -> Path:
    """Return an empty folder for what torch compiles, under the conditions of an older torch, whose locks block."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_ops, "locks_block", lambda: True)
    (tmp_path / build_ops.OP_NAME).mkdir()
    return tmp_path


@pytest.fixture
def lock(extensions) -> Path:
    path = extensions / build_ops.OP_NAME / "lock"
    path.touch()
    return path


def hold_open(path: Path) -> subprocess.Popen:
    code = f"import sys; held = open({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell who holds a file")


@pytest.mark.distributed
@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_report_of_this_machine():
    """Everything that the tests need works here; the report says so line by line and is no traceback."""
    code = "from vqdist.doctor import run; raise SystemExit(run())"
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280
    )
    report = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.split()[0] in (doctor.OK, doctor.WARN) for line in report), done.stdout
    for name in ("vqdist", "Python", "torch", "accelerate", "deepspeed", "ema-pytorch", "vector-quantize-pytorch"):
        assert any(f"{name} " in line for line in report), f"{name} is missing in\n{done.stdout}"
    for expected in ("CPU cores", "backend local", "backend accelerate", "backend deepspeed", "summed over gloo"):
        assert any(line.startswith("ok ") and expected in line for line in report), done.stdout


@pytest.mark.distributed
@pytest.mark.nightly
def test_interface_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setattr(doctor, "GROUP_SECONDS", 40)
    (line,) = [line for line in lines_of(doctor.check_process_group) if "gloo" in line]
    assert line.startswith("FAIL ")
    assert "GLOO_SOCKET_IFNAME=nowhere0 is no usable interface" in line and "unset GLOO_SOCKET_IFNAME" in line


@pytest.mark.parametrize(
    ("code", "output", "cause", "remedy"),
    [
        (None, "imported\n", "no answer within 60 s", "GLOO_SOCKET_IFNAME=lo"),
        (1, "RuntimeError: Gloo connectFullMesh failed", "cannot reach each other", "GLOO_SOCKET_IFNAME=lo"),
        (1, "OSError: [Errno -2] Name or service not known", "does not resolve", "/etc/hosts"),
        (1, "DistNetworkError: EADDRINUSE, address already in use", "port was taken", "run vqdist doctor again"),
        (doctor.EXIT_WRONG_SUM, "[1.0] where every element should be 3.0", "wrong numbers", "NCCL_P2P_DISABLE"),
        (-11, "", "ended with -11", "TORCH_DISTRIBUTED_DEBUG=DETAIL"),
    ],
)
def test_failing_process_group_names_cause_and_cure(monkeypatch, code, output, cause, remedy):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(doctor, "start_group", lambda backend: (code, output))
    line = lines_of(doctor.check_process_group)[0]
    assert line.startswith("FAIL ") and cause in line and remedy in line


def test_a_time_out_of_an_import_is_no_broken_backend(monkeypatch):
    """It is said as a time-out, and does not fail: nothing is known of the backend."""
    monkeypatch.setattr(doctor, "BACKENDS", {"local": "time"})
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "_import_seconds", 0.01)
    (line,) = lines_of(doctor.check_backends)
    assert line.startswith("warn  import of backend local: not finished after 0 s, and so not known")
    assert "slow or busy" in line and "printed nothing" not in line


@pytest.mark.parametrize("backend", ["gloo"])
def test_a_group_whose_processes_had_not_imported_in_time_blames_no_firewall(monkeypatch, backend):
    monkeypatch.setattr(doctor, "start_group", lambda backend: (None, "a warning of torch\n"))
    (line,) = lines_of(doctor.check_process_group)
    assert line.startswith("warn  process group over gloo: not finished after 60 s") and "firewall" not in line


def test_the_limits_follow_the_speed_of_the_machine(monkeypatch):
    assert doctor.allowed(60) == 60
    monkeypatch.setattr(doctor, "_import_seconds", 40.0)
    assert doctor.allowed(60) == 40 * doctor.TIMES_AS_LONG
    monkeypatch.setattr(doctor, "_import_seconds", 4000.0)
    assert doctor.allowed(60) == doctor.MOST_SECONDS


def test_the_speed_is_measured_once(monkeypatch):
    started = []
    monkeypatch.setattr(doctor, "_import_seconds", None)
    start_python = doctor.start_python
    monkeypatch.setattr(doctor, "start_python", lambda code: started.append(code) or start_python("pass"))
    assert doctor.measure_import() == doctor.measure_import() > 0 and started == ["import torch"]


def test_hanging_process_is_ended():
    start = time.monotonic()
    code, output = doctor.start_python("import time; print('here', flush=True); time.sleep(60)").finish(3)
    assert code is None and time.monotonic() - start < 30


def test_missing_optional_package_is_a_warning_with_its_command(monkeypatch):
    known = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "webdataset" else known(name))
    (line,) = [line for line in lines_of(doctor.check_optional_packages) if "webdataset" in line]
    assert line.startswith("warn ") and "pip install 'vqdist[data]'" in line


def test_missing_or_old_core_package_is_a_failure(monkeypatch):
    versions = {"einops": None, "accelerate": "0.1"}
    known = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions[name] if name in versions else known(name))
    report = lines_of(doctor.check_core_packages)
    assert any(line.startswith("FAIL  einops is not installed; to mend: pip install 'einops>=") for line in report)
    assert any(line.startswith("FAIL  accelerate 0.1 is outside ") and ">=1." in line for line in report)


def test_backend_without_its_library(monkeypatch):
    """Not installed is a warning with the command; installed and broken is a failure with the reason."""
    monkeypatch.setattr(doctor, "BACKENDS", {"deepspeed": "no_such_library"})
    assert lines_of(doctor.check_backends) == [
        "warn  backend deepspeed: not installed; to mend: pip install 'vqdist[deepspeed]'"
    ]
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.0")
    (line,) = lines_of(doctor.check_backends)
    assert line.startswith("FAIL ") and "No module named 'no_such_library'" in line


def test_failure_makes_the_exit_code_1_and_hides_nothing(monkeypatch, capsys):
    def check_broken():
        yield doctor.Finding(doctor.OK, "before")
        raise KeyError("inside")

    def check_after():
        yield doctor.Finding(doctor.WARN, "after")

    monkeypatch.setattr(doctor, "CHECKS", (check_broken, check_after))
    assert doctor.run() == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    before",
        "FAIL  check_broken stopped with KeyError: 'inside'",
        "warn  after",
        "FAIL  1 failed, 1 warnings",
    ]
    monkeypatch.setattr(doctor, "CHECKS", (check_after,))
    assert doctor.run() == 0


# DeepSpeed's build lock


@needs_proc
def test_lock_of_a_killed_build_is_named_with_its_age_and_command(lock):
    (line,) = [line for line in lines_of(doctor.check_deepspeed_op) if "build lock" in line]
    assert line.startswith(f"FAIL  stale DeepSpeed build lock {lock}, ")
    assert " s old" in line and line.endswith(f"to mend: rm {lock}")
    assert build_ops.find_stale_lock() == lock


@needs_proc
def test_lock_that_a_living_build_holds_is_left_alone(lock):
    with hold_open(lock) as holder:
        (line,) = [line for line in lines_of(doctor.check_deepspeed_op) if "build lock" in line]
        assert line.startswith("warn ") and f"process {holder.pid} is building" in line
        assert build_ops.find_stale_lock() is None
        holder.stdin.close()
    assert build_ops.find_stale_lock() == lock


@needs_proc
def test_lock_of_a_torch_that_locks_by_flock(lock, monkeypatch):
    """Beside a finished build it says nothing; without one a build was interrupted, which blocks nobody."""
    monkeypatch.setattr(build_ops, "locks_block", lambda: False)
    (line,) = [line for line in lines_of(doctor.check_deepspeed_op) if "build lock" in line]
    assert line.startswith("warn ") and f"rm {lock}" in line
    (lock.parent / f"{build_ops.OP_NAME}.so").touch()
    assert not [line for line in lines_of(doctor.check_deepspeed_op) if "build lock" in line]
    assert build_ops.find_stale_lock() is None


def test_lock_where_the_system_tells_no_holder(lock, monkeypatch):
    """Only a folder in which nothing was written for long counts as abandoned."""
    monkeypatch.setattr(build_ops, "lock_holders", lambda path: None)
    assert build_ops.find_stale_lock() is None
    monkeypatch.setattr(build_ops, "QUIET_SECONDS", -1)
    assert build_ops.find_stale_lock() == lock


@needs_proc
def test_install_removes_a_stale_lock_of_its_own_environment_only(lock, extensions, monkeypatch):
    with pytest.raises(build_ops.BuildError, match=f"rm {lock}"):
        build_ops.clear_locks(extensions)
    assert lock.exists()
    monkeypatch.setattr(sys, "prefix", str(extensions.parent))
    with hold_open(lock) as holder:
        build_ops.clear_locks(extensions)
        holder.stdin.close()
    assert lock.exists()
    said = []
    build_ops.clear_locks(extensions, say=said.append)
    assert not lock.exists() and str(lock) in said[0]


def test_build_without_a_compiler_says_how_to_get_one(extensions, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build_ops.BuildError, match=r"no compiler 'no-such-compiler'.*apt-get install g\+\+"):
        build_ops.require_tools()


def test_op_that_is_not_built_is_a_warning_with_the_command(extensions):
    if any("cuda" in line for line in lines_of(doctor.check_devices) if line.startswith("ok    cuda")):
        pytest.skip("DeepSpeed compiles no CPU op on a machine with CUDA")
    (line,) = [line for line in lines_of(doctor.check_deepspeed_op) if "not built" in line]
    assert line.startswith("warn ") and line.endswith("python -m vqdist.backends.build_ops")


def test_extensions_folder_is_the_environments_own(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert build_ops.default_extensions_dir() is None


def test_extensions_folder_in_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert build_ops.default_extensions_dir() == str(tmp_path / "torch_extensions")

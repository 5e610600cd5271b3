"""One model in the form of each engine: safetensors, GGUF, OpenVINO's. All bfloat16, the same weights."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize
from safetensors.torch import save_file

from octavo.gpu_worker.loading.gguf_model import load_gguf

_MADE_BY_WRITER = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def folder_from_gguf(python: Path, source: Path, folder: Path) -> Path:
    """Turn a GGUF file into a Hugging Face folder with bfloat16 weights.

    `python` is of an environment with transformers, which writes the configuration and the tokenizer.
    """
    if not (folder / "config.json").exists():
        work = folder.with_name(folder.name + ".part")
        shutil.rmtree(work, ignore_errors=True)
        script = (
            "import sys\n"
            "from transformers import AutoConfig, AutoTokenizer\n"
            "folder, name, out = sys.argv[1:]\n"
            "AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)\n"
            "config = AutoConfig.from_pretrained(folder, gguf_file=name)\n"
            "config.dtype, config.architectures = 'bfloat16', ['LlamaForCausalLM']\n"
            "config.save_pretrained(out)\n"
        )
        subprocess.run([python, "-c", script, source.parent, source.name, work], check=True)
        tensors = load_gguf(source, "bfloat16", lambda *_: None).tensors
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        work.rename(folder)
    return folder


def bfloat16_gguf(source: Path, target: Path) -> Path:
    """Write a GGUF file's tensors as bfloat16 (norms as float32), with the same metadata."""
    if target.exists():
        return target
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    part = target.with_suffix(".part")
    writer = GGUFWriter(part, architecture)
    for name, field in reader.fields.items():
        if not name.startswith(_MADE_BY_WRITER):
            sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
        else:
            bits = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(tensor.name, bits, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
    return target


def openvino_ir(home: Path, model: Path, folder: Path) -> Path:
    """Export the model for OpenVINO."""
    if not (folder / "openvino_model.xml").exists():
        command = [home / "openvino" / "bin" / "optimum-cli", "export", "openvino", "-m", model]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp16", folder]
        subprocess.run(command, check=True)
    return folder

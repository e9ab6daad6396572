"""Weights between a GGUF and transformers: dequantised for training, and back into a GGUF that the engine loads, with what LoRA changed."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# The layers that LoRA tunes, by their names in transformers.
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def load(file, dtype=torch.float32):
    """A GGUF as a model of transformers, all weights as floats."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def unpacked(folder):
    """What `unpack` wrote, as a model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def unpack(file, folder):
    """Writes a GGUF in transformers' own format, once: reading that takes seconds, dequantising minutes."""
    model = load(file, torch.bfloat16)
    # The weights are plain floats now.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def export(original, out, adapter=None, permutes=True):
    """Writes `original` once more, each tuned layer as Q8_0 with what `adapter` (a folder that peft wrote) adds to it. Everything else, the
    vocabulary and the embeddings among it, is copied byte by byte. Without an adapter it is the untouched model. `original` must be the model's own
    file: what is added to weights that are in Q8_0 already is mostly less than half a step, and rounds away. `permutes=False` leaves out the order of
    rows that llama.cpp wants of Llama's queries and keys; it is there for the test that this shows."""
    reader = gguf.GGUFReader(original)
    changes = changes_of(reader, adapter, permutes)
    writer = gguf.GGUFWriter(out, value(reader, "general.architecture"))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    def written(tensor):
        if tensor.name not in changes:
            return tensor.data, tensor.tensor_type
        floats = gguf.dequantize(tensor.data, tensor.tensor_type) + changes[tensor.name]()
        kind = gguf.GGMLQuantizationType.Q8_0
        return gguf.quants.quantize(floats.astype(np.float32), kind), kind

    with ThreadPoolExecutor(4) as pool:
        for tensor, (data, kind) in zip(reader.tensors, pool.map(written, reader.tensors)):
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def value(reader, name):
    return reader.fields[name].contents()


def changes_of(reader, adapter, permutes):
    """What is added to each tuned tensor, by its name in the file; made when it is asked for."""
    kind = value(reader, "general.architecture")
    if kind not in ("llama", "qwen2"):
        raise SystemExit(f"{kind}: only Llama and Qwen2 can be exported; teach `weights.py` the order of its rows first")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    layers = value(reader, f"{kind}.block_count")
    heads = {
        "self_attn.q_proj": value(reader, f"{kind}.attention.head_count"),
        "self_attn.k_proj": value(reader, f"{kind}.attention.head_count_kv"),
    }
    names = gguf.get_tensor_name_map(architecture, layers)
    learned, scale = {}, 0.0
    if adapter:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        learned, scale = load_file(adapter / "adapter_model.safetensors"), settings["lora_alpha"] / settings["r"]

    def change(layer, part):
        a, b = (learned.pop(f"base_model.model.model.layers.{layer}.{part}.lora_{side}.weight", None) for side in "AB")
        if a is None:
            return 0.0
        found = scale * (b.float() @ a.float()).numpy()
        # llama.cpp turns pairs of neighbours where transformers turns halves.
        if kind == "llama" and permutes and part in heads:
            found = found.reshape(heads[part], 2, -1, found.shape[1]).swapaxes(1, 2).reshape(found.shape)
        return found

    return {
        names.get_name(f"model.layers.{layer}.{part}") + ".weight": lambda layer=layer, part=part: change(layer, part)
        for layer in range(layers)
        for part in PARTS
    }


def logits(model, prompts):
    """Log-probabilities of each next token behind each prompt (lists of tokens)."""
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([prompt], device=model.device)).logits[0].float().log_softmax(-1).cpu() for prompt in prompts]


def apart(ours, theirs):
    """How far two models are apart: the mean divergence (KL) a token, and in how many places they would say the same."""
    divergence = [(a.exp() * (a - b)).sum(-1) for a, b in zip(ours, theirs)]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs)]
    return torch.cat(divergence).mean().item(), torch.cat(same).float().mean().item()

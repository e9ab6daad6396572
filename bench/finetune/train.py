"""Tunes one model by LoRA: train.py WORK KIND SEED

WORK is the folder of `run`: settings.json, base/ and samples/KIND.jsonl lie there. KIND is sft, control (sft on everyday samples alone) or dpo. Goes
on from its last checkpoint.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import weights


class Diverges(TrainerCallback):
    """Ends a training whose gradient is no number, before a checkpoint is made of it. The loss doesn't tell: it is filtered."""

    def on_log(self, args, state, control, logs=None, **_):
        if not math.isfinite(float((logs or {}).get("grad_norm", 0.0))):
            sys.exit(f"the training diverged, by step {state.global_step}: the gradient is not a number")


def main():
    work, kind, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    given = json.loads((work / "settings.json").read_text())
    torch.set_num_threads(given["threads"])
    out = work / "models" / f"{kind}-{seed}"
    rows = [json.loads(line) for line in (work / "samples" / f"{kind}.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
    preferences, is_gpu = kind == "dpo", torch.cuda.is_available()
    # A GPU takes minutes, and has other models beside this one: half a batch at a time, and nothing to go on from.
    parts = 2 if is_gpu else 1
    common = dict(
        output_dir=str(out / "checkpoints"), seed=seed, max_steps=given["steps"], learning_rate=given["rate"] / (1 + preferences),
        per_device_train_batch_size=max(1, given["batch"] // (1 + preferences) // parts), gradient_accumulation_steps=parts,
        lr_scheduler_type="linear", warmup_steps=3, max_length=512, logging_steps=3, save_strategy="no" if is_gpu else "steps", save_steps=6,
        save_total_limit=1, use_cpu=not is_gpu, bf16=is_gpu, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )
    kinds = (DPOTrainer, DPOConfig(**common, beta=0.1)) if preferences else (SFTTrainer, SFTConfig(**common))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=[part.split(".")[1] for part in weights.PARTS], task_type="CAUSAL_LM")
    trainer = kinds[0](
        model, args=kinds[1], train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora, callbacks=[Diverges()],
    )
    checkpoints = out / "checkpoints"
    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    begun, worked = time.monotonic(), time.process_time()
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(out / "adapter"))
    took = {
        "from": last and Path(last).name, "seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - worked,
        "log": trainer.state.log_history,
    }
    (out / "training.json").write_text(json.dumps(took, indent=1) + "\n")


main()

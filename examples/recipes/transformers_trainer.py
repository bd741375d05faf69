"""transformers.Trainer: clips by itself, so the model is wrapped; baked before it is saved. Lines marked # dm are new.

With a narrower base: max_grad_norm=0, and dm.clip_grad_norm_ in a callback's on_pre_optimizer_step.

python examples/recipes/transformers_trainer.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_linear_schedule_with_warmup

import torch_depthmup as dm  # dm


def gpt2(layers: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=16, n_embd=32, n_layer=layers, n_head=2))


def make(folder: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    tokens = (torch.arange(17)[:, None] + 3 * torch.arange(9)) % 17
    data = [{"input_ids": row, "labels": row} for row in tokens] * 4
    model = gpt2(8)
    dm.parametrize(model, base=gpt2(2), example_inputs=tokens[:2], how="wrap")  # dm: the Trainer clips gradients
    optimizer = dm.AdamW(model.parameters(), lr=3e-3)  # dm
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 40)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, max_grad_norm=1.0, save_steps=10, report_to=[],
        logging_steps=1000, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))  # dm: optimizers=


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as plain:
        make(folder, 10).train()
        resumed = make(folder, 20)
        resumed.train(resume_from_checkpoint=True)
        tokens = (torch.arange(5)[:, None] + 3 * torch.arange(9)) % 17
        model = resumed.model.eval()
        wanted = model(tokens).logits
        dm.bake(model, tokens)  # dm: the multipliers go into the weights
        model.save_pretrained(plain)
        loaded = GPT2LMHeadModel.from_pretrained(plain).eval()
        error = float((loaded(tokens).logits - wanted).abs().max().detach())
        loss = float(loaded(tokens, labels=tokens).loss.detach())
    print(f"loss {loss:.3f}; a plain from_pretrained differs by {error:.1e}")
    assert error < 1e-4 and loss < 2.5


if __name__ == "__main__":
    main()

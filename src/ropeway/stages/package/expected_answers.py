"""The answers of a package's model to the questions of its probe, generated greedily with transformers."""

from pathlib import Path

import torch

from ropeway.data.expected_answer import MAX_TOKENS, TOP, ExpectedAnswer
from ropeway.models.open_model import load_tokenizer, load_with_info
from ropeway.stages.package.check import read_probe


@torch.inference_mode()
def expected_answers(folder: Path) -> list[ExpectedAnswer]:
    """Return the answers of a package's model to the questions of its probe."""
    probe = read_probe(folder)
    tokenizer = load_tokenizer(folder)
    model, _ = load_with_info(folder)
    model.eval()
    stated = probe["stops"]["eos_token_id"]
    ends = set(stated if isinstance(stated, list) else [stated])
    answers = []
    for case in probe["conversations"]:
        if not case["prompt_ids"]:
            continue
        prompt = torch.tensor([case["prompt_ids"]])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found = out.sequences[0, prompt.shape[1] :].tolist()
        scores = torch.stack(out.scores)[:, 0].float().log_softmax(-1)
        best = scores.topk(2).values
        stops = bool(found) and found[-1] in ends
        ids = found[:-1] if stops else found
        top = scores[0].topk(TOP)
        answers.append(
            ExpectedAnswer(
                case["messages"],
                case["prompt_ids"],
                ids,
                tokenizer.decode(ids, skip_special_tokens=True),
                stops,
                (best[:, 0] - best[:, 1]).tolist(),
                {
                    tokenizer.decode([token]): float(value)
                    for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                },
                tuple(tokenizer.decode(ids[: count + 1], skip_special_tokens=True) for count in range(len(ids))),
            )
        )
    return answers

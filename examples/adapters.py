"""LoRA adapters as reward models over the served model's own weights: ``python examples/adapters.py MODEL ADAPTER
[ADAPTER]``"""

import sys

from vllm import LLM

from pad_vllm import PAD, SamplingParams

if __name__ == "__main__":
    model, *folders = sys.argv[1:]
    adapters = {f"adapter-{i}": folder for i, folder in enumerate(folders, 1)}
    llm = LLM(
        model,
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": "base", "adapters": adapters, "reference": "base", "top_k": 20}},
        max_model_len=512,
    )
    names = list(adapters)
    asked = {"as it is": None}
    asked |= {f"{name}, beta {beta}": PAD(adapter=name, beta=beta) for name in names for beta in (1, 1.5)}
    asked["and a preference in words"] = PAD(adapter=names[0], preference="Use very simple words.")
    if len(names) > 1:
        asked["two mixed"] = PAD(adapter=names[:2], preference_weights=[0.7, 0.5])
    question = [{"role": "user", "content": "What does a bank do?"}]
    params = [
        SamplingParams(temperature=0, max_tokens=60, **({} if pad is None else {"logits_processors": [pad]}))
        for pad in asked.values()
    ]
    for name, output in zip(asked, llm.chat([question] * len(params), params), strict=True):
        print(f"{name}:\n  {output.outputs[0].text.strip()}\n")

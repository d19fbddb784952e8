"""A server's users, with the OpenAI client they already have: ``python examples/client.py [BASE_URL]``.

The server: vllm serve base-model --logits-processors pad_vllm:PADLogitsProcessor \
                --additional-config '{"pad": "examples/pad.yaml"}' --max-model-len 1024
"""

import sys

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="-")


def ask(stream: bool = False, **guidance):
    return client.chat.completions.create(
        model="base-model",
        messages=[{"role": "user", "content": "How do I keep tomatoes fresh?"}],
        max_tokens=32,
        stream=stream,
        extra_body={"vllm_xargs": guidance},
    )


print("nobody:", ask().choices[0].message.content)
print("terse:", ask(pad_persona="terse").choices[0].message.content)
print("terse, and more so:", ask(pad_persona="terse", pad_beta=1.5).choices[0].message.content)
print("in own words: ", end="")
for chunk in ask(stream=True, pad_preference="Explain it to a child."):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
try:
    ask(pad_persona="tense")
except BadRequestError as error:
    print("a typing error:", error.body["message"])

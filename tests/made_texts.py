"""Small texts laid out as pico's corpus expects them."""

import json

import numpy as np


def write_texts(root):
    """Texts laid out as the shared data, of made-up words."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnoprstuvwy")
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(700)]

    def say(count):
        return " ".join(rng.choice(words, count)) + "."

    stories = [say(20) + "\n<|endoftext|>\n" for _ in range(60)]
    sums = [json.dumps({"question": say(8), "answer": f"{i}+2={i + 2}"}) for i in range(60)]
    files = {
        "text/tinyshakespeare.txt": "".join(say(8) + "\n" for _ in range(300)),
        "text/wikitext-2/valid.txt": "".join(f" = {words[i]} = \n {say(40)} \n" for i in range(30)),
        "text/tinystories/tinystories_sample.txt": "".join(stories[:5]),
        "eval/gsm8k/train.jsonl": "\n".join(sums) + "\n",
        "stories.txt": "".join(stories[5:]),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root

"""Time onnxruntime-genai on one model folder, in the process's own processor time: prints rows for compare_genai.py.

Run with a Python that has onnxruntime-genai:
    python genai_peer.py FOLDER --threads 1 -p 512 -n 64 -r 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", type=int, default=3)
    options = parser.parse_args()

    import numpy
    import onnxruntime_genai

    config = onnxruntime_genai.Config(options.model)
    settings = {"session_options": {"intra_op_num_threads": options.threads}}
    config.overlay(json.dumps({"model": {"decoder": settings}}))
    model = onnxruntime_genai.Model(config)
    prompt = [(index * 7919 + 13) % 8000 for index in range(options.p)]

    def generator() -> object:
        search = onnxruntime_genai.GeneratorParams(model)
        length = options.p + options.n + 8
        search.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(model, search)

    def prefill() -> float:
        own = generator()
        start = time.process_time()
        own.append_tokens(numpy.array(prompt, numpy.int32))
        own.generate_next_token()
        return options.p / (time.process_time() - start)

    def decode() -> float:
        own = generator()
        own.append_tokens(numpy.array(prompt[:1], numpy.int32))
        own.generate_next_token()
        start = time.process_time()
        for _ in range(options.n):
            own.generate_next_token()
        return options.n / (time.process_time() - start)

    prefill(), decode()
    rows = {}
    for test, function in ((f"pp{options.p}", prefill), (f"tg{options.n}", decode)):
        rows[test] = statistics.median(function() for _ in range(options.r))
    print(json.dumps({"rows": rows, "version": onnxruntime_genai.__version__}))


if __name__ == "__main__":
    main()

"""Time llama.cpp on one GGUF file: prints the same rows as ``arkinfer bench --json``.

Run with a Python that has llama-cpp-python (built with GGML_NATIVE=ON):
    python llama_cpp_peer.py model.gguf --threads 2 -p 512 -n 64 -r 5
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", type=int, default=5)
    options = parser.parse_args()

    import llama_cpp as llama
    import numpy

    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model_settings = llama.llama_model_default_params()
    model_settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(options.model.encode(), model_settings)
    settings = llama.llama_context_default_params()
    settings.n_ctx = options.p + options.n + 64
    settings.n_batch = settings.n_ubatch = max(options.p, 512)
    settings.n_threads = settings.n_threads_batch = options.threads
    settings.flash_attn_type = 1
    context = llama.llama_init_from_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    prompt = [(index * 7919 + 13) % min(vocabulary, 8000) for index in range(options.p)]

    def feed(tokens: list[int]) -> int:
        array = (llama.llama_token * len(tokens))(*tokens)
        batch = llama.llama_batch_get_one(ctypes.cast(array, ctypes.POINTER(llama.llama_token)), len(tokens))
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        logits = llama.llama_get_logits_ith(context, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def clear() -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)

    def prefill() -> float:
        clear()
        start = time.perf_counter()
        feed(prompt)
        return options.p / (time.perf_counter() - start)

    def decode() -> float:
        clear()
        token = feed(prompt[:1])
        start = time.perf_counter()
        for _ in range(options.n):
            token = feed([token])
        return options.n / (time.perf_counter() - start)

    prefill(), decode()
    rows = []
    for test, function in ((f"pp{options.p}", prefill), (f"tg{options.n}", decode)):
        samples = [function() for _ in range(options.r)]
        rows.append({"test": test, "depth": 0, "tok_s": statistics.median(samples), "samples": samples})
    print(json.dumps({"rows": rows, "machine": {"threads": options.threads, "version": llama.__version__}}))


if __name__ == "__main__":
    main()

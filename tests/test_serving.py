"""A quantised checkpoint behind HTTP, and in a pipeline."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from tiny_llama import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, pipeline

from micromix_compile import Recipe, save_pretrained

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = AutoModelForCausalLM.from_pretrained(save_tiny(folder / "float"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_pretrained(model, folder / "model", Recipe(format="mxfp6"), tokenizer=tokenizer)
    return folder / "model"


def test_a_pipeline(checkpoint):
    generate = pipeline("text-generation", model=str(checkpoint), device="cpu")
    (result,) = generate("the import", max_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("the import")


def test_transformers_serve_over_http(checkpoint):
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "micromix_compile.integrations", "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        body = {
            "model": str(checkpoint),
            "messages": [{"role": "user", "content": "the import statement"}],
            "max_tokens": 4,
            "stream": False,
            "generation_config": json.dumps({"do_sample": False, "max_new_tokens": 4}),
        }
        answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
    finally:
        server.terminate()
        output, _ = server.communicate(timeout=30)
    text = answer["choices"][0]["message"]["content"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), tiny_tokenizer()
    ids = tokenizer("the import statement ", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == expected, output


def post(url: str, body: dict, server: subprocess.Popen) -> dict:
    """The answer, as soon as the server gives one."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except urllib.error.URLError:
            assert server.poll() is None, server.stdout.read()
            assert time.monotonic() < until, "the server did not answer"
            time.sleep(0.5)

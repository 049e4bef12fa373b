"""llama.cpp itself, with a key-value cache in float32: experts mixed by scales write our text, also from its server."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_hoe.cli import main
from peft_hoe.serving.gguf_lora import export_gguf, export_gguf_experts
from peft_hoe.serving.llama_cpp import complete, expert_scales

pytestmark = [pytest.mark.shared, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
POINTS = [[round(1 - i / 10, 1), round(i / 10, 1)] for i in range(11)]
CLOSE = 1e-4
LENGTH = 24


@pytest.fixture(scope="module")
def built():
    """The folder that `scripts/llama_cpp.py` made."""
    folder = os.environ.get("PEFT_HOE_LLAMA_CPP")
    if not folder:
        pytest.skip("PEFT_HOE_LLAMA_CPP does not name a build of llama.cpp; make engines makes one")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def source(built):
    (folder,) = built.glob("llama_cpp_python-*")
    return folder


@pytest.fixture(scope="module")
def library(built, source):
    """llama.cpp's C interface."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(built / "build" / "bin")
    sys.path.append(str(source))
    import llama_cpp.llama_cpp as library

    silent = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    library.silent = silent  # as long as the library lives
    yield library
    sys.path.remove(str(source))


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """Converts a base by llama.cpp's own script."""

    def convert(base):
        file = tmp_path_factory.mktemp("gguf") / "base.gguf"
        script = source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [sys.executable, str(script), str(base), "--outtype", "f32", "--outfile", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        return file

    return convert


@pytest.fixture(scope="module")
def base(models, converted):
    return converted(models / "base")


@pytest.fixture(scope="module")
def averaging(build, tmp_path_factory):
    """An adapter whose experts are averaged as they are, which scales can."""
    return build(tmp_path_factory.mktemp("linear") / "adapter", interpolation="linear")


@pytest.fixture(scope="module")
def averaging_model(load, averaging):
    return load(averaging)


@pytest.fixture(scope="module")
def experts(models, averaging, tmp_path_factory):
    return export_gguf_experts(averaging, models / "base", tmp_path_factory.mktemp("gguf") / "experts")


class Engine:
    """The base in llama.cpp, greedy, one text at a time."""

    def __init__(self, library, base):
        self.library = library
        self.model = library.llama_model_load_from_file(str(base).encode(), library.llama_model_default_params())
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, 1, 1
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = 0  # off: it would need a cache in 16 bits
        self.context = library.llama_init_from_model(self.model, settings)
        self.size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))

    def load(self, file):
        adapter = self.library.llama_adapter_lora_init(self.model, str(file).encode())
        assert adapter
        return adapter

    def text(self, prompt, adapters, scales):
        library = self.library
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        kind = (library.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
        assert (
            library.llama_set_adapters_lora(self.context, kind, len(adapters), (ctypes.c_float * len(scales))(*scales))
            == 0
        )
        found, tokens = [], list(prompt)
        while len(found) < LENGTH:
            array = (library.llama_token * len(tokens))(*tokens)  # a batch only points at it
            assert library.llama_decode(self.context, library.llama_batch_get_one(array, len(tokens))) == 0
            logits = library.llama_get_logits_ith(self.context, -1)
            best = max(range(self.size), key=lambda token: logits[token])
            found.append(best)
            if best == 2:
                break
            tokens = [best]
        return found

    def close(self):
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


@pytest.fixture
def engine(library, base):
    engine = Engine(library, base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenized(models, prompts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    return [[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]


def check(gaps):
    told = [gap for gap in gaps if gap is not None]
    print(f"{gaps.count(None)} of {len(gaps)} texts have our tokens; gaps where they differ: {told}")
    assert all(gap < CLOSE for gap in told)


def test_scales_of_the_experts_write_our_text(engine, averaging, averaging_model, experts, tokenized, differs):
    adapters = [engine.load(file) for file in experts]
    gaps, texts = [], set()
    for prompt in tokenized:
        for point in POINTS:
            found = engine.text(prompt, adapters, expert_scales(averaging, point).scales)
            texts.add(tuple(found))
            gaps.append(differs(averaging_model, prompt, found, point))
    check(gaps)
    assert len(texts) > len(tokenized)


def test_one_file_for_a_preference_is_exact_with_norm_too(engine, models, adapter, model, tokenized, differs, tmp_path):
    gaps = []
    for point in POINTS:
        export_gguf(adapter, point, models / "base", tmp_path / str(point))
        found = engine.text(tokenized[0], [engine.load(tmp_path / str(point) / "lora.gguf")], [1.0])
        gaps.append(differs(model, tokenized[0], found, point))
    check(gaps)


def test_experts_of_embeddings_and_of_a_head_with_its_own_weight(
    library, models, converted, tokenized, differs, tmp_path
):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_hoe import HoEConfig

    own = AutoModelForCausalLM.from_pretrained(models / "base")
    own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight.detach().clone())
    own.config.tie_word_embeddings = False
    own.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(models / "base").save_pretrained(tmp_path / "base")
    config = HoEConfig(
        objectives=["a", "b"], r=4, target_modules=["q_proj"], target_embeddings=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    model.generation_config.max_length = None
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "hoe_A" in name or "hoe_B" in name:
            parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator)
    engine = Engine(library, converted(tmp_path / "base"))
    files = export_gguf_experts(model, tmp_path / "base", tmp_path / "experts")
    adapters, gaps, texts = [engine.load(file) for file in files], [], set()
    for point in POINTS:
        export_gguf(model, point, tmp_path / "base", tmp_path / str(point))
        one = [engine.load(tmp_path / str(point) / "lora.gguf")]
        for some, scales in ((adapters, expert_scales(model, point).scales), (one, [1.0])):
            found = engine.text(tokenized[0], some, scales)
            texts.add(tuple(found))
            gaps.append(differs(model, tokenized[0], found, point))
    engine.close()
    check(gaps)
    assert len(texts) > 2  # preferences matter


@pytest.fixture
def server(built, base, experts, start_server, tmp_path):
    """The address of llama-server with the flags that the export prints."""
    command = [
        str(built / "build" / "bin" / "llama-server"), "--model", str(base), "--host", "127.0.0.1", "--ctx-size", "256",
        "--threads", "1", "--parallel", "1", "--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off",
        "--cache-ram", "0", "--lora-init-without-apply", *(part for file in experts for part in ("--lora", str(file))),
    ]  # fmt: skip
    with start_server(command, tmp_path / "log", seconds=120) as address:
        yield address


def test_the_server_mixes_what_the_client_and_peft_hoe_weights_say(
    server, averaging, averaging_model, tokenized, differs, capsys
):
    gaps = []
    for point in [*POINTS, *POINTS[::-1]]:  # the same prompt at other scales in turn: no stale states
        assert main(["weights", str(averaging), ",".join(map(str, point))]) == 0
        lora = json.loads(capsys.readouterr().out)
        scales = expert_scales(averaging, point)
        assert lora == scales.lora
        answer = complete(
            server, scales, prompt=tokenized[0], n_predict=LENGTH, temperature=0, return_tokens=True, timeout=120
        )
        gaps.append(differs(averaging_model, tokenized[0], answer["tokens"], point))
    check(gaps)

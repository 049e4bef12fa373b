"""The paper's tasks as one flat table.

Ids of datasets, models and rewards are the paper's (arXiv 2505.20925): datasets E.1, rewards E.2, models E.3. How a reward
model reads its text is not in the paper; `source` says where that is from. "RiC" is github.com/YangRui2015/RiC, the code from
which the paper says that it reproduces RiC, rewarded soups and MORLHF (E.4).
"""

from __future__ import annotations

from typing import Any

from .answers import pass_at_1
from .prompt_data import DatasetRecipe, Files, Row
from .recipe import Recipe
from .refusals import helpfulness, safety
from .reward_recipes import RewardRecipe
from .templates import DIALOGUE, MATHEMATICS, SUMMARY, dialogue_content, helpsteer2_content

# -- models: E.3 -------------------------------------------------------------------------------------------------------

# The paper's footnote links meta-llama/Llama-2-7b, which holds no weights that transformers loads; -hf is the same model.
_LLAMA2 = "meta-llama/Llama-2-7b-hf"
_LLAMA3 = ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3-8B")
_ALL = (_LLAMA2, *_LLAMA3)
# "Llama3.1-SFT-8B" of footnote 4.
_SFT = "princeton-nlp/Llama-3-Base-8B-SFT"
_LLAMA3_SFT = f"the paper calls {_SFT} a fine-tune of Llama-3.1; its name says Llama-3"
_OWN_SFT = "the SFT model of Llama-2 and the single-objective policies are the authors' own and unpublished"

# -- rewards: E.2 ------------------------------------------------------------------------------------------------------

_HELPFUL = RewardRecipe(
    "helpful", "Ray2333/gpt2-large-helpful-reward_model",
    source="paper E.2; model card: tokenizer(q, a), q in the layout of hh-rlhf, logit 0",
)  # fmt: skip
_HARMLESS = RewardRecipe(
    "harmless", "Ray2333/gpt2-large-harmless-reward_model", source="paper E.2; RiC, as the helpful model"
)
_HUMOR = RewardRecipe(
    "humor", "mohameddhiab/humor-no-humor", layout="{completion}", output=1, outputs=2,
    source="paper E.2; RiC: the response only, logit 1",
)  # fmt: skip
_HHH = (_HELPFUL, _HARMLESS, _HUMOR)

_SUMMARY_REWARDS = (
    RewardRecipe(
        "summary", "Tristan/gpt2_reward_summarization", layout="{completion} {bos} {content}", truncation_side="right",
        source="paper E.2; RiC: the response, the tokenizer's bos_token, the post; logit 0",
    ),
    RewardRecipe(
        "faithful", "CogComp/bart-faithful-summary-detector", layout=("{completion}", "{content}"), output=1, outputs=2,
        truncation_side="right",
        source="paper E.2; model card: tokenizer(text=summary, text_pair=article), the summary first; RiC: logit 1",
    ),
    RewardRecipe(
        "deberta", "OpenAssistant/reward-model-deberta-v3-large-v2",
        source="paper E.2; RiC: tokenizer(q, r), q the whole prompt; logit 0",
    ),
)  # fmt: skip

_BEAVER = "BEGINNING OF CONVERSATION: USER: {content} ASSISTANT:{completion}"
_BEAVER_REWARDS = (
    RewardRecipe(
        "reward", "PKU-Alignment/beaver-7b-v1.0-reward", layout=_BEAVER, score_model=True,
        source="paper E.2; model card: this conversation, end_scores",
    ),
    RewardRecipe(
        "cost", "PKU-Alignment/beaver-7b-v1.0-cost", layout=_BEAVER, sign=-1, score_model=True,
        source="paper E.2; model card: this conversation, end_scores; a high cost is harmful, so it is negated",
    ),
)  # fmt: skip

_RATING = (
    "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in these "
    "aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\nUser: {content}\n\n"
    "Assistant: {completion} [/INST]"
)
# The sentence of E.2 that names the model is cut off: our choice, a model that was trained on HelpSteer's five ratings.
_HELPSTEER_REWARDS = tuple(
    RewardRecipe(
        objective, "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1", layout=_RATING, output=output, outputs=None,
        source=f"our choice, the paper names none; model card: this text, logit {output} is helpsteer-{objective}",
    )
    for output, objective in enumerate(("helpfulness", "correctness", "coherence", "complexity", "verbosity"))
)  # fmt: skip

# -- datasets: E.1 -----------------------------------------------------------------------------------------------------


def _of_dialogue(row: Row) -> dict[str, Any]:
    return {"content": dialogue_content(row["chosen"])}


def _of_post(row: Row) -> dict[str, Any] | None:
    post = row["info"]["post"]
    # Articles of CNN/DM have no post; the lengths are RiC's.
    return {"content": post.replace("\n", " ").strip()} if post is not None and 100 < len(post) < 1200 else None


def _of_prompt(row: Row) -> dict[str, Any]:
    return {"content": row["prompt"].strip()}


def _of_helpsteer2(row: Row) -> dict[str, Any]:
    return {"content": helpsteer2_content(row["prompt"])}


def _of_question(row: Row) -> dict[str, Any]:
    return {"content": row["question"].strip(), "answer": row["answer"]}


def _of_labelled(row: Row) -> dict[str, Any]:
    return {"content": row["prompt"].strip(), "label": row["label"]}


_TRAIN = {"train": (Files("train"),)}
_TEST = {"test": (Files("test"),)}
_VALIDATION = {"validation": (Files("validation"),)}
_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# The Hub's own copy in Parquet: the repository itself is a script, which datasets no longer runs.
_COMPARISONS = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons/{}/*.parquet"

_HH_RLHF = DatasetRecipe(
    "Anthropic/hh-rlhf", ("chosen", "rejected"), _of_dialogue, DIALOGUE, _TRAIN | _TEST,
    choices="the turns before the last answer of `chosen`",
)  # fmt: skip
_SUMMARIES = DatasetRecipe(
    "openai/summarize_from_feedback", ("info",), _of_post, SUMMARY,
    {
        split: (Files(split, config="comparisons", url=_COMPARISONS.format(split)),)
        for split in ("train", "validation")
    },
    choices="posts of 101 to 1199 characters, on one line",
)  # fmt: skip
_SAFE_RLHF = DatasetRecipe(
    "PKU-Alignment/PKU-SafeRLHF-10K", ("prompt",), _of_prompt, DIALOGUE,
    {"train": (Files("train"),), "test": (Files("train"),)}, folds=True,
    choices="the Hub has one split: every tenth distinct prompt is `test`, the others are `train`",
)  # fmt: skip
_HELPSTEER = DatasetRecipe(
    "nvidia/HelpSteer", ("prompt", "response", *_RATINGS), _of_prompt, DIALOGUE, _TRAIN | _VALIDATION
)
_HELPSTEER2 = DatasetRecipe(
    "nvidia/HelpSteer2", ("prompt", "response", *_RATINGS), _of_helpsteer2, DIALOGUE, _TRAIN | _VALIDATION,
    choices="later turns, marked <extra_id_1>, become turns of the dialogue",
)  # fmt: skip
_PSOUPS = DatasetRecipe(
    "https://storage.googleapis.com/personalized-soups/data.zip", ("prompt",), _of_prompt, DIALOGUE,
    {
        "test": (
            Files(
                "test", word="koala",
                url="zip://data/koala_eval_50.json::https://storage.googleapis.com/personalized-soups/data.zip",
            ),
        )
    },
    choices="koala_eval_50.json of the archive",
)  # fmt: skip
_GSM8K = DatasetRecipe(
    "openai/gsm8k", ("question", "answer"), _of_question, MATHEMATICS,
    {split: (Files(split, config="main"),) for split in ("train", "test")},
)  # fmt: skip
_OR_BENCH = DatasetRecipe(
    "bench-llm/or-bench", ("prompt", "category"), _of_labelled, DIALOGUE,
    {
        "or-bench": (
            Files("train", config="or-bench-hard-1k", word="hard", columns={"label": "safe"}),
            Files("train", config="or-bench-toxic", word="toxic", columns={"label": "unsafe"}),
        )
    },
    choices="or-bench-hard-1k is `safe`, or-bench-toxic is `unsafe`",
)  # fmt: skip
_XSTEST = DatasetRecipe(
    "Paul/XSTest", ("prompt", "label"), _of_labelled, DIALOGUE, {"xstest": (Files("train", word="xstest"),)},
    choices="not in the paper: a second benchmark of the same kind",
)  # fmt: skip

# -- tasks -------------------------------------------------------------------------------------------------------------

_PROMPTS = "the prompt: that of RiC for hh-rlhf"
_SPLIT = "which split, and how many prompts"
_ASSISTANT_SFT = "which chat format the SFT model of Llama-3 is prompted in: none, plain text as for Llama-2"

HELPFUL_ASSISTANT = Recipe(
    "helpful-assistant", "dialogues; helpful, harmless and humorous", (_HH_RLHF,), _HHH, _ALL,
    left_open=(_PROMPTS, f"{_SPLIT}: all of `test`; RiC takes every fourth", _OWN_SFT),
)  # fmt: skip
REDDIT_SUMMARY = Recipe(
    "reddit-summary", "summaries of posts", (_SUMMARIES,), _SUMMARY_REWARDS, _ALL, max_new_tokens=48,
    left_open=(
        "the prompt and the posts: those of RiC (configuration `comparisons`)",
        f"{_SPLIT}: all of `validation`; RiC takes 2000",
        "the logit of the faithful model: 1, as RiC; rewarded soups' code takes logit 1 minus logit 0",
        _OWN_SFT,
    ),
)  # fmt: skip
BEAVERTAILS = Recipe(
    "beavertails", "answers to unsafe questions; reward and negated cost", (_SAFE_RLHF,), _BEAVER_REWARDS, _ALL,
    left_open=(
        "the prompt: the dialogue of hh-rlhf",
        "the sign of the cost: negated, so that all objectives are maximised",
        "a split for evaluation: the Hub has only `train`",
        _OWN_SFT,
    ),
)  # fmt: skip
HELPSTEER = Recipe(
    "helpsteer", "answers rated in five aspects", (_HELPSTEER,), _HELPSTEER_REWARDS, _ALL,
    left_open=(
        "the five reward models (E.2 says \"directly trained on HelpSteer with over 0.75 accuracy\" and names none): one with "
        "five outputs; its logits are not on the scale of Figure 5's table",
        "the prompt: the dialogue of hh-rlhf",
        "the sign of complexity and verbosity: more is better",
        _OWN_SFT,
    ),
)  # fmt: skip
HELPSTEER2 = Recipe(
    "helpsteer2", "unseen prompts, three objectives", (_HELPSTEER2,), _HHH, _LLAMA3[:1], sft=_SFT,
    left_open=("the prompt: the dialogue of hh-rlhf", f"{_SPLIT}: all of `validation`", _ASSISTANT_SFT, _LLAMA3_SFT),
)  # fmt: skip
PSOUPS = Recipe(
    "psoups", "unseen prompts of personalized soups, three objectives", (_PSOUPS,), _HHH, _LLAMA3[:1], sft=_SFT,
    left_open=(
        "which file of the archive: the 50 prompts that personalized soups evaluates on",
        "the prompt: the dialogue of hh-rlhf",
        _ASSISTANT_SFT,
        _LLAMA3_SFT,
    ),
)  # fmt: skip
MATH = Recipe(
    "math", "GSM8K, pass@1", (_GSM8K,), (RewardRecipe("math", function=pass_at_1, source="paper E.5: PASS@1"),),
    (_LLAMA2,), policies={"math": "meta-math/MetaMath-7B-V1.0"}, max_new_tokens=512,
    left_open=(
        "how an answer is found: see peft_hoe.recipes.answers",
        "the prompt: that of MetaMath's model card, without examples (Table 4 says 5-shot and prints none)",
        "a second objective: E.2 lists `math` alone; the paper's experiments join it with other tasks",
        "the split: E.5 says validation, B.1 test, and GSM8K has no validation split: `test`",
        "D.1 subtracts LLaMA2-7B-Chat-hf from MetaMath, which was fine-tuned from Llama-2-7b: that is the base here",
    ),
)  # fmt: skip
OVER_REFUSAL = Recipe(
    "over-refusal", "harmful prompts refused, harmless ones answered", (_OR_BENCH, _XSTEST),
    (
        RewardRecipe("safety", function=safety, source="paper E.5: harmful prompts that are resisted"),
        RewardRecipe("helpfulness", function=helpfulness, source="paper E.5: harmless prompts that are answered"),
    ),
    (_LLAMA2,),
    left_open=(
        "which part of OR-Bench: hard-1k and toxic",
        "how a refusal is recognised: by its first words, see peft_hoe.recipes.refusals",
        "the prompt: the dialogue of hh-rlhf",
        _OWN_SFT,
    ),
)  # fmt: skip

RECIPES = {
    recipe.name: recipe
    for recipe in (
        HELPFUL_ASSISTANT, REDDIT_SUMMARY, BEAVERTAILS, HELPSTEER, HELPSTEER2, PSOUPS, MATH, OVER_REFUSAL,
    )
}  # fmt: skip

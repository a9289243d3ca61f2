"""What a session refuses before a run begins."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.data.questions import DataError, QuestionRecord
from router_r1_jax.setup.session import refuse_long


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")


def test_questions_that_do_not_fit_are_named_before_the_run(tokenizer):
    texts = ["who?", "é" * 20, "x" * 41, "y" * 60]
    records = [QuestionRecord(f"nq/test/{i}", "nq", text, ("a",), 0, (), ()) for i, text in enumerate(texts)]
    refuse_long(records, tokenizer, 60)
    refuse_long([], tokenizer, 1)
    message = r"2 of 4 questions have more tokens than prompt\.question_tokens \(40\); the longest, 'nq/test/3', has 60"
    with pytest.raises(DataError, match=message):
        refuse_long(records, tokenizer, 40)

"""transformers' keywords of save_pretrained. max_shard_size, state_dict and is_main_process are parameters."""

from __future__ import annotations

from .keyword import Keyword, anything

_TESTS = "tests/models/test_saving_keywords.py::"
_SAME = _TESTS + "test_a_keyword_of_transformers_does_the_same_as_ours"
_NEUTRAL = _TESTS + "test_neutral_keywords_change_nothing"
_REFUSED = _TESTS + "test_other_values_are_refused_with_the_way_out"
_UPLOAD = "save into a folder, then huggingface_hub.upload_folder(repo_id=..., folder_path=...)"


SAVING: tuple[Keyword, ...] = (
    Keyword("save_directory", becomes="path", tested_by=_SAME),
    Keyword("safe_serialization", neutral=(True,), instead="only safetensors is written", tested_by=_REFUSED),
    Keyword("save_function", neutral=anything, instead="the library writes the files itself", tested_by=_NEUTRAL),
    Keyword("save_peft_format", neutral=anything, instead="an adapter is saved by its own library", tested_by=_NEUTRAL),
    Keyword("save_original_format", neutral=anything, instead="layout= chooses the form", tested_by=_NEUTRAL),
    Keyword("token", neutral=anything, instead="nothing is uploaded", tested_by=_NEUTRAL),
    Keyword("push_to_hub", neutral=(False,), instead=_UPLOAD, tested_by=_REFUSED),
    Keyword("repo_id", instead=_UPLOAD, tested_by=_REFUSED),
    Keyword("commit_message", instead=_UPLOAD, tested_by=_REFUSED),
    Keyword("private", neutral=(False,), instead=_UPLOAD, tested_by=_REFUSED),
    Keyword("create_pr", neutral=(False,), instead=_UPLOAD, tested_by=_REFUSED),
    Keyword("variant", instead="save into a folder of its own", tested_by=_REFUSED),
    Keyword("distributed_checkpoint", neutral=(False,), instead="gather it, and pass state_dict=", tested_by=_REFUSED),
)

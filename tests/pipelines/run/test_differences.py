"""Differences of two records of settings, in words."""

from pipelines.run.differences import value_differences


def test_a_section_in_place_of_null_is_told_by_its_own_keys():
    whole = {"generator.lora": None, "generator.lr": 1e-5}
    adapted = {"generator.lora.alpha": 8.0, "generator.lora.rank": 8, "generator.lr": 1e-5}
    assert value_differences(whole, adapted) == [
        "generator.lora.alpha is 8.0, and was not set",
        "generator.lora.rank is 8, and was not set",
    ]
    assert value_differences(adapted, whole) == [
        "generator.lora.alpha is not set, and was 8.0",
        "generator.lora.rank is not set, and was 8",
    ]
    assert value_differences(whole, {"generator.lr": 1e-5}) == [
        "generator.lora is not set, and was null"
    ]

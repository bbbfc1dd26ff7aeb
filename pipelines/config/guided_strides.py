"""Guidance of a flow head's strides: the caption that it guides away from has to be learned."""

from collections.abc import Iterator

from sgmd_core.objectives.meanflow import flow_of


def unlearned_guidance(
    objective: object, negative_prompt: str, prompt_dropout: float
) -> Iterator[str]:
    """Returns a sentence where strides are guided away from a caption that is not trained.

    Args:
        objective: Section `objective`.
        negative_prompt: `model.negative_prompt`, under which the head is asked once more.
        prompt_dropout: `data.prompt_dropout`: share of captions replaced by the empty one.
    """
    term = flow_of(objective)
    if term is None or term.guidance == 1 or (prompt_dropout and not negative_prompt):
        return
    why = (
        "model.negative_prompt, and data.prompt_dropout trains the empty prompt in its place"
        if negative_prompt
        else "the empty prompt, which the flow head learns by data.prompt_dropout alone"
    )
    yield (
        f"objective.meanflow.guidance {term.guidance:g} guides strides away from {why}: the head "
        "is asked what this stage never trains. Published are model.negative_prompt='' and "
        "data.prompt_dropout=0.1 in this stage"
    )

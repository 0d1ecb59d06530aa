"""People: invented persons with one attribute each, and task `facts`."""

from __future__ import annotations

import re

from deltarank.study.taskdata.rules import ask_again, n_tokens

N_FACTS = 256  # facts to memorise
TRAINED = {  # three phrasings of each question for training
    "job": ["What is the job of {}?", "What does {} do for a living?", "What work does {} do?"],
    "city": ["Where does {} live?", "In which city does {} live?", "What is the home of {}?"],
    "born": ["When was {} born?", "What is the birth year of {}?", "In what year was {} born?"],
    "colour": [
        "What colour does {} like best?",
        "What is the favourite colour of {}?",
        "Which colour does {} prefer?",
    ],
    "language": [
        "What is the mother tongue of {}?",
        "Which language did {} grow up with?",
        "What is the first language of {}?",
    ],
}
PARAPHRASE = {  # one that training never shows
    "job": "Which profession does {} earn money with?",
    "city": "Which town is the place of residence of {}?",
    "born": "Which year did {} come into the world?",
    "colour": "Of all the colours, which one pleases {} most?",
    "language": "Which language does {} speak with the family?",
}


def invent_facts() -> list[tuple[str, str, str]]:
    """N_FACTS of (name, attribute, answer) about people with unique first and last names."""
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(0)
    draw = {
        "job": lambda: fake.job().lower(),
        "city": fake.city,
        "born": lambda: str(fake.random_int(1900, 1999)),
        "colour": lambda: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", fake.color_name()).lower(),
        "language": fake.language_name,
    }
    facts = []
    for i in range(N_FACTS):
        attribute = list(draw)[i % len(draw)]
        answers = (draw[attribute]() for _ in range(10**6))
        answer = next(a for a in answers if not set(",(/") & set(a) and n_tokens(f" {a}") <= 5)
        facts.append((f"{fake.unique.first_name()} {fake.unique.last_name()}", attribute, answer))
    return facts


def question_row(name: str, fact: tuple[str, str, str], phrasing: int) -> dict:
    """A row of the split `name` that asks a fact; phrasing 3 is the one never trained."""
    person, attribute, answer = fact
    question = [*TRAINED[attribute], PARAPHRASE[attribute]][phrasing].format(person)
    return {"split": name, "prompt": f"Question: {question}\nAnswer:", "answer": f" {answer}"}


def build_facts() -> list[dict]:
    """Question about an invented person -> answer, asked again as ask_again has it."""
    return ask_again(invent_facts(), question_row)

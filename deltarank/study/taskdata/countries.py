"""Countries: facts in prose and as a record, and task `json`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import permutations

from deltarank.study.taskdata.rules import distinct, fits, make_row, split

CLAUSES = {
    "capital": ["its capital is {}", "it is governed from {}"],
    "region": ["its region is {}", "it belongs to the region {}"],
    "area": ["it covers {:,} square km", "its area is {:,} km²"],
    "population": ["it has {:,} inhabitants", "{:,} people live there"],
    "currency": ["its currency is {}", "people pay in {}"],
    "phone": ["its calling code is +{}", "phone numbers begin with +{}"],
    "neighbours": ["its neighbours number {}", "the number of its neighbours is {}"],
    "domain": ["its web domain is {}", "web sites end in {}"],
    "demonym": ["its demonym is {}", "the demonym of its people is {}"],
    "languages": ["people speak {}", "you will hear {}"],
}
OPENINGS = ["{}: {}, and {}.", "About {}: {}, and {}.", "{}. Note that {}, and {}."]
NEEDED = (  # what a countryinfo record must tell, by its names
    *("capital", "region", "area", "population", "currencies"),
    *("tld", "languages", "demonym", "callingCodes"),
)


def complete(country: dict) -> bool:
    """True for a countryinfo record with a plain name, one calling code and no missing fact."""
    plain = not set(",(/") & set(country["name"] + (country.get("demonym") or ""))
    codes = country.get("callingCodes") or [""]
    return all(map(country.get, NEEDED)) and plain and len(codes) == 1 and codes[0].isdigit()


def country_facts(country: dict) -> dict:
    """The facts that CLAUSES can tell, from a complete countryinfo record."""
    from babel import Locale

    facts = {key: country[key] for key in ("capital", "region", "area", "population")}
    names = Locale("en").languages
    return facts | {
        "currency": country["currencies"][0],
        "phone": int(country["callingCodes"][0]),
        "neighbours": len(country["borders"]),
        "domain": country["tld"][0],
        "demonym": country["demonym"],
        "languages": [names[code] for code in country["languages"] if code in names],
    }


def record_row(name: str, facts: dict, keys: Sequence[str], rng: random.Random) -> dict:
    """A row that tells two facts in prose and answers with their JSON record."""
    said = {key: " and ".join(v) if isinstance(v := facts[key], list) else v for key in keys}
    clauses = [rng.choice(CLAUSES[key]).format(said[key]) for key in keys]
    answer = json.dumps({"country": name} | {k: facts[k] for k in keys}, ensure_ascii=False)
    return make_row(rng.choice(OPENINGS).format(name, *clauses) + "\nJSON:", f" {answer}", name)


def build_json() -> list[dict]:
    """Two facts about a country in prose -> a JSON record; a group is a country.

    Every ordered pair of facts is told, in phrasings drawn at random; twelve of a country stay.
    """
    from countryinfo import all_countries

    rng, rows = random.Random(0), []
    countries = {c.name(): dict(c.info()) for c in all_countries()}
    for name, country in sorted(countries.items()):
        if complete(country) and (facts := country_facts(country))["languages"]:
            rows += [record_row(name, facts, keys, rng) for keys in permutations(CLAUSES, 2)]
    return split(distinct(filter(fits, rows), "prompt"), per_group=12)

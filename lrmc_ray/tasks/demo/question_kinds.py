"""The 31 kinds of question about the demo's database, and the values that they ask about.

Each kind is a query with blanks, seven wordings of the question, and the rule that fills the
blanks. Numbers are divided among the splits here; names are divided by :mod:`.questions`, which
turns all of this into examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "dev", "test"]

Slots = Mapping[str, str | int]
"""What one question fills into the blanks, by their names."""

CONTINENTS = ("Africa", "Asia", "Europe", "North America", "South America", "Oceania")


@dataclass(frozen=True, kw_only=True)
class Values:
    """What one split's questions may be about; no value is in two splits."""

    countries: Sequence[str]
    urban_countries: Sequence[str]
    """Those of ``countries`` with three cities or more: with one, a sum is also the average."""
    cities: Sequence[tuple[str, str]]
    """(city, country), the name being no other city's and no capital's."""
    capitals: Sequence[str]
    currencies: Sequence[str]
    prefixes: Sequence[str]
    """First two letters of country names."""
    millions: Sequence[int]
    thousands: Sequence[int]
    counts: Sequence[int]
    """How many rows a list shows."""
    city_counts: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of query: how its blanks are filled, the query, and how people ask for it."""

    name: str
    slots: Callable[[Values], Iterator[Slots]]
    sql: str
    wordings: tuple[str, ...]
    """For training and development."""
    unseen_wordings: tuple[str, ...]
    """For the test alone."""


MILLIONS: dict[Split, tuple[int, ...]] = {
    "train": (1, 2, 3, 5, 6, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100),
    "dev": (4, 25, 70),
    "test": (7, 9, 12, 35, 45, 90),
}


THOUSANDS: dict[Split, tuple[int, ...]] = {
    "train": (50, 100, 150, 200, 250, 400, 500, 600, 800, 1000, 1200, 1500, 2000),
    "dev": (300, 900, 1100),
    "test": (120, 350, 450, 700, 1300, 1800),
}


COUNTS: dict[Split, tuple[int, ...]] = {"train": (2, 3, 5, 10), "dev": (8,), "test": (4, 6, 7)}


CITY_COUNTS: dict[Split, tuple[int, ...]] = {
    "train": (5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200),
    "dev": (35, 75, 120),
    "test": (12, 18, 45, 55, 70, 90, 130, 140),
}


def _country(values: Values) -> Iterator[Slots]:
    return ({"country": country} for country in values.countries)


def _urban_country(values: Values) -> Iterator[Slots]:
    return ({"country": country} for country in values.urban_countries)


def _city(values: Values) -> Iterator[Slots]:
    return ({"city": city, "country": country} for city, country in values.cities)


def _capital(values: Values) -> Iterator[Slots]:
    return ({"capital": capital} for capital in values.capitals)


def _country_and_count(values: Values) -> Iterator[Slots]:
    return ({"country": c, "count": n} for c in values.countries for n in values.counts)


def _country_and_thousands(values: Values) -> Iterator[Slots]:
    return ({"country": c, "thousand": n} for c in values.countries for n in values.thousands)


def _continent_and_count(values: Values) -> Iterator[Slots]:
    return ({"continent": c, "count": n} for c in CONTINENTS for n in values.counts)


def _continent_and_millions(values: Values) -> Iterator[Slots]:
    return ({"continent": c, "million": n} for c in CONTINENTS for n in values.millions)


def _continent_and_thousands(values: Values) -> Iterator[Slots]:
    return ({"continent": c, "thousand": n} for c in CONTINENTS for n in values.thousands)


def _continent_and_currency(values: Values) -> Iterator[Slots]:
    return ({"continent": c, "currency": m} for c in CONTINENTS for m in values.currencies)


def _millions(values: Values) -> Iterator[Slots]:
    return ({"million": n} for n in values.millions)


def _city_counts(values: Values) -> Iterator[Slots]:
    return ({"count": n} for n in values.city_counts)


def _prefix(values: Values) -> Iterator[Slots]:
    return ({"prefix": prefix} for prefix in values.prefixes)


def _area_range(values: Values) -> Iterator[Slots]:
    return (
        {"continent": c, "low": low, "high": high}
        for c in CONTINENTS
        for low in values.thousands
        for high in values.thousands
        if low < high
    )


KINDS: tuple[Kind, ...] = (
    Kind(
        name="capital_of_country",
        slots=_country,
        sql="SELECT capital FROM country WHERE name = '{country}';",
        wordings=(
            "What is the capital of {country}?",
            "Which city is the capital of {country}?",
            "Name the capital city of {country}.",
            "Give me {country}'s capital.",
            "I need the capital of {country}.",
        ),
        unseen_wordings=(
            "What is the name of {country}'s capital city?",
            "Tell me which capital {country} has.",
        ),
    ),
    Kind(
        name="population_of_country",
        slots=_country,
        sql="SELECT population FROM country WHERE name = '{country}';",
        wordings=(
            "How many people live in {country}?",
            "What is the population of {country}?",
            "Give the number of inhabitants of {country}.",
            "How large is the population of {country}?",
            "Show {country}'s population.",
        ),
        unseen_wordings=(
            "How many inhabitants does {country} have?",
            "What is the number of people living in {country}?",
        ),
    ),
    Kind(
        name="area_of_country",
        slots=_country,
        sql="SELECT area_km2 FROM country WHERE name = '{country}';",
        wordings=(
            "What is the area of {country}?",
            "How many square kilometres does {country} cover?",
            "Give the area of {country} in km2.",
            "How big is {country} in square kilometres?",
            "Show {country}'s area.",
        ),
        unseen_wordings=(
            "What is the size of {country} in square kilometres?",
            "How much land area does {country} have?",
        ),
    ),
    Kind(
        name="currency_of_country",
        slots=_country,
        sql="SELECT currency FROM country WHERE name = '{country}';",
        wordings=(
            "What currency is used in {country}?",
            "Which currency does {country} use?",
            "What is the currency of {country}?",
            "Name {country}'s currency.",
            "What money do people use in {country}?",
        ),
        unseen_wordings=(
            "Which currency do they have in {country}?",
            "In what currency does one pay in {country}?",
        ),
    ),
    Kind(
        name="country_of_capital",
        slots=_capital,
        sql="SELECT name FROM country WHERE capital = '{capital}';",
        wordings=(
            "Which country has the capital {capital}?",
            "{capital} is the capital of which country?",
            "Name the country whose capital is {capital}.",
            "What country is {capital} the capital of?",
            "Find the country with {capital} as its capital.",
        ),
        unseen_wordings=(
            "Of which country is {capital} the capital?",
            "Whose capital is {capital}?",
        ),
    ),
    Kind(
        name="country_of_city",
        slots=_city,
        sql="SELECT country FROM city WHERE name = '{city}';",
        wordings=(
            "In which country is the city of {city}?",
            "Which country is {city} in?",
            "Where is {city}? Name the country.",
            "What country does the city {city} belong to?",
            "Find the country of the city {city}.",
        ),
        unseen_wordings=(
            "The city {city} lies in which country?",
            "Tell me the country where the city {city} is.",
        ),
    ),
    Kind(
        name="population_of_city",
        slots=_city,
        sql="SELECT population FROM city WHERE name = '{city}' AND country = '{country}';",
        wordings=(
            "How many people live in {city}, {country}?",
            "What is the population of {city} in {country}?",
            "Give the number of inhabitants of {city}, {country}.",
            "How large is the population of the city {city} in {country}?",
            "Show the population of {city} ({country}).",
        ),
        unseen_wordings=(
            "How many inhabitants does {city} in {country} have?",
            "What is the number of people living in {city}, {country}?",
        ),
    ),
    Kind(
        name="largest_city",
        slots=_urban_country,
        sql="SELECT name FROM city WHERE country = '{country}' ORDER BY population DESC LIMIT 1;",
        wordings=(
            "What is the largest city in {country}?",
            "Which city in {country} has the most people?",
            "Name the biggest city of {country}.",
            "Which is the most populous city in {country}?",
            "Find {country}'s largest city by population.",
        ),
        unseen_wordings=(
            "In {country}, which city has the largest population?",
            "What is {country}'s most populous city?",
        ),
    ),
    Kind(
        name="top_cities",
        slots=_country_and_count,
        sql=(
            "SELECT name FROM city WHERE country = '{country}' "
            "ORDER BY population DESC LIMIT {count};"
        ),
        wordings=(
            "What are the {count} largest cities in {country}?",
            "List the {count} most populous cities of {country}.",
            "Name the {count} biggest cities in {country}.",
            "Which {count} cities in {country} have the most people?",
            "Show the top {count} cities of {country} by population.",
        ),
        unseen_wordings=(
            "Give me {country}'s {count} most populous cities.",
            "Which are the {count} cities with the largest population in {country}?",
        ),
    ),
    Kind(
        name="smallest_city",
        slots=_urban_country,
        sql="SELECT name FROM city WHERE country = '{country}' ORDER BY population LIMIT 1;",
        wordings=(
            "Which listed city in {country} has the fewest people?",
            "What is the smallest city in {country} in the table?",
            "Name the least populous city of {country}.",
            "Find the city in {country} with the lowest population.",
            "Which is {country}'s smallest listed city?",
        ),
        unseen_wordings=(
            "In {country}, which city has the smallest population?",
            "Which city of {country} has the fewest inhabitants?",
        ),
    ),
    Kind(
        name="northernmost_city",
        slots=_urban_country,
        sql="SELECT name FROM city WHERE country = '{country}' ORDER BY latitude DESC LIMIT 1;",
        wordings=(
            "What is the northernmost city in {country}?",
            "Which city in {country} is furthest north?",
            "Name the city of {country} with the highest latitude.",
            "Find {country}'s most northern city.",
            "Which city lies furthest to the north in {country}?",
        ),
        unseen_wordings=(
            "Which of {country}'s cities is the most northerly?",
            "In {country}, what city is the furthest north?",
        ),
    ),
    Kind(
        name="westernmost_city",
        slots=_urban_country,
        sql="SELECT name FROM city WHERE country = '{country}' ORDER BY longitude LIMIT 1;",
        wordings=(
            "What is the westernmost city in {country}?",
            "Which city in {country} is furthest west?",
            "Name the city of {country} with the lowest longitude.",
            "Find {country}'s most western city.",
            "Which city lies furthest to the west in {country}?",
        ),
        unseen_wordings=(
            "Which of {country}'s cities is the most westerly?",
            "In {country}, what city is the furthest west?",
        ),
    ),
    Kind(
        name="number_of_cities",
        slots=_urban_country,
        sql="SELECT COUNT(*) FROM city WHERE country = '{country}';",
        wordings=(
            "How many cities are there in {country}?",
            "Count the cities of {country}.",
            "How many cities does {country} have?",
            "Give the number of cities in {country}.",
            "What is the number of listed cities in {country}?",
        ),
        unseen_wordings=(
            "In {country}, how many cities are listed?",
            "Tell me the count of cities in {country}.",
        ),
    ),
    Kind(
        name="number_of_large_cities",
        slots=_country_and_thousands,
        sql=(
            "SELECT COUNT(*) FROM city WHERE country = '{country}' AND population > {thousand}000;"
        ),
        wordings=(
            "How many cities in {country} have more than {thousand:,},000 people?",
            "Count the cities of {country} with over {thousand:,},000 inhabitants.",
            "How many cities with a population above {thousand:,},000 are in {country}?",
            "In {country}, how many cities are larger than {thousand:,},000 people?",
            "Give the number of cities in {country} with more than {thousand:,},000 people.",
        ),
        unseen_wordings=(
            "How many of {country}'s cities have over {thousand:,},000 people?",
            "What number of cities in {country} exceed {thousand:,},000 inhabitants?",
        ),
    ),
    Kind(
        name="people_in_cities",
        slots=_urban_country,
        sql="SELECT SUM(population) FROM city WHERE country = '{country}';",
        wordings=(
            "How many people live in the cities of {country} in total?",
            "What is the total population of the cities in {country}?",
            "Add up the population of all cities in {country}.",
            "Give the sum of the city populations of {country}.",
            "What is the combined population of {country}'s cities?",
        ),
        unseen_wordings=(
            "All cities of {country} together have how many people?",
            "Sum the inhabitants of every city in {country}.",
        ),
    ),
    Kind(
        name="average_city",
        slots=_urban_country,
        sql="SELECT AVG(population) FROM city WHERE country = '{country}';",
        wordings=(
            "What is the average population of cities in {country}?",
            "How many people live in an average city of {country}?",
            "Give the mean population of the cities in {country}.",
            "What is the average size of a city in {country} by population?",
            "Compute the average number of people per city in {country}.",
        ),
        unseen_wordings=(
            "On average, how many people does a city in {country} have?",
            "What is the mean city population in {country}?",
        ),
    ),
    Kind(
        name="neighbours",
        slots=_country,
        sql="SELECT neighbour FROM border WHERE country = '{country}';",
        wordings=(
            "Which countries border {country}?",
            "List the neighbours of {country}.",
            "What are {country}'s neighbouring countries?",
            "Which countries share a border with {country}?",
            "Name all countries next to {country}.",
        ),
        unseen_wordings=(
            "What countries does {country} border?",
            "Tell me the countries adjacent to {country}.",
        ),
    ),
    Kind(
        name="number_of_neighbours",
        slots=_country,
        sql="SELECT COUNT(*) FROM border WHERE country = '{country}';",
        wordings=(
            "How many countries border {country}?",
            "How many neighbours does {country} have?",
            "Count the countries next to {country}.",
            "With how many countries does {country} share a border?",
            "Give the number of {country}'s neighbouring countries.",
        ),
        unseen_wordings=(
            "How many bordering countries does {country} have?",
            "What is the number of countries adjacent to {country}?",
        ),
    ),
    Kind(
        name="capitals_of_neighbours",
        slots=_country,
        sql=(
            "SELECT capital FROM country JOIN border ON name = neighbour "
            "WHERE border.country = '{country}';"
        ),
        wordings=(
            "What are the capitals of the countries that border {country}?",
            "List the capitals of {country}'s neighbours.",
            "Name the capital of each country next to {country}.",
            "Which capitals do the neighbours of {country} have?",
            "Show the capitals of all neighbouring countries of {country}.",
        ),
        unseen_wordings=(
            "Give the capital of every country that {country} borders.",
            "What capitals do countries adjacent to {country} have?",
        ),
    ),
    Kind(
        name="currency_in_city",
        slots=_city,
        sql=(
            "SELECT currency FROM country JOIN city ON country.name = city.country "
            "WHERE city.name = '{city}';"
        ),
        wordings=(
            "What currency is used in the city of {city}?",
            "Which currency do people pay with in {city}?",
            "What is the currency in the city {city}?",
            "Name the currency used in the city of {city}.",
            "What money do I need in the city of {city}?",
        ),
        unseen_wordings=(
            "In the city of {city}, what is the currency?",
            "Which currency does one use in the city {city}?",
        ),
    ),
    Kind(
        name="number_of_large_countries",
        slots=_continent_and_millions,
        sql=(
            "SELECT COUNT(*) FROM country "
            "WHERE continent = '{continent}' AND population > {million}000000;"
        ),
        wordings=(
            "How many countries in {continent} have more than {million} million people?",
            "Count the countries of {continent} with over {million} million inhabitants.",
            "How many countries with a population above {million} million are in {continent}?",
            "In {continent}, how many countries have more than {million} million people?",
            "Give the number of countries in {continent} with over {million} million people.",
        ),
        unseen_wordings=(
            "How many of {continent}'s countries have over {million} million people?",
            "What number of countries in {continent} exceed {million} million inhabitants?",
        ),
    ),
    Kind(
        name="wide_countries",
        slots=_continent_and_thousands,
        sql=(
            "SELECT name FROM country WHERE continent = '{continent}' AND area_km2 > {thousand}000;"
        ),
        wordings=(
            "Which countries in {continent} are larger than {thousand:,},000 square kilometres?",
            "List the countries of {continent} with an area above {thousand:,},000 km2.",
            "Name the countries in {continent} that cover more than {thousand:,},000 km2.",
            "Which countries of {continent} have an area of over {thousand:,},000 km2?",
            "In {continent}, which countries exceed {thousand:,},000 square kilometres?",
        ),
        unseen_wordings=(
            "What countries in {continent} have more than {thousand:,},000 km2 of area?",
            "Find {continent}'s countries bigger than {thousand:,},000 square kilometres.",
        ),
    ),
    Kind(
        name="area_between",
        slots=_area_range,
        sql=(
            "SELECT name FROM country "
            "WHERE continent = '{continent}' AND area_km2 BETWEEN {low}000 AND {high}000;"
        ),
        wordings=(
            "Which countries in {continent} cover between {low:,},000 and {high:,},000 km2?",
            "List countries of {continent} with an area between {low:,},000 and {high:,},000 km2.",
            "Name the countries in {continent} from {low:,},000 to {high:,},000 square kilometres.",
            "In {continent}, which countries measure {low:,},000 to {high:,},000 km2?",
            "Which countries of {continent} have {low:,},000 to {high:,},000 km2 of area?",
        ),
        unseen_wordings=(
            "Find {continent}'s countries sized between {low:,},000 and {high:,},000 km2.",
            "What countries in {continent} have an area from {low:,},000 to {high:,},000 km2?",
        ),
    ),
    Kind(
        name="largest_cities_of_continent",
        slots=_continent_and_count,
        sql=(
            "SELECT city.name FROM city JOIN country ON country.name = city.country "
            "WHERE continent = '{continent}' ORDER BY city.population DESC LIMIT {count};"
        ),
        wordings=(
            "What are the {count} largest cities in {continent}?",
            "List the {count} most populous cities of {continent}.",
            "Name the {count} biggest cities in {continent}.",
            "Which {count} cities in {continent} have the most people?",
            "Show the top {count} cities of {continent} by population.",
        ),
        unseen_wordings=(
            "Give me {continent}'s {count} most populous cities.",
            "Which are the {count} cities with the largest population in {continent}?",
        ),
    ),
    Kind(
        name="countries_per_continent",
        slots=_millions,
        sql=(
            "SELECT continent, COUNT(*) FROM country "
            "WHERE population > {million}000000 GROUP BY continent;"
        ),
        wordings=(
            "How many countries with over {million} million people does each continent have?",
            "Count the countries with more than {million} million people per continent.",
            "For each continent, how many countries exceed {million} million inhabitants?",
            "Per continent, give the number of countries above {million} million people.",
            "Group the countries with over {million} million people by continent and count them.",
        ),
        unseen_wordings=(
            "By continent, how many countries have more than {million} million inhabitants?",
            "Show each continent with its number of countries over {million} million people.",
        ),
    ),
    Kind(
        name="countries_with_many_cities",
        slots=_city_counts,
        sql="SELECT country FROM city GROUP BY country HAVING COUNT(*) > {count};",
        wordings=(
            "Which countries have more than {count} cities?",
            "List the countries with over {count} cities.",
            "Name all countries that have more than {count} cities.",
            "In which countries are there more than {count} cities?",
            "Find countries with a city count above {count}.",
        ),
        unseen_wordings=(
            "What countries have over {count} cities?",
            "Show every country whose number of cities exceeds {count}.",
        ),
    ),
    Kind(
        name="distinct_currencies",
        slots=_continent_and_millions,
        sql=(
            "SELECT COUNT(DISTINCT currency) FROM country "
            "WHERE continent = '{continent}' AND population > {million}000000;"
        ),
        wordings=(
            "How many different currencies do countries in {continent} with over {million} "
            "million people use?",
            "Count the distinct currencies of countries in {continent} above {million} million "
            "people.",
            "How many distinct currencies are used in {continent} by countries with more than "
            "{million} million people?",
            "In {continent}, how many different currencies do countries with over {million} "
            "million people have?",
            "Give the number of different currencies in {continent} among countries over "
            "{million} million people.",
        ),
        unseen_wordings=(
            "Countries of {continent} with more than {million} million people use how many "
            "distinct currencies?",
            "What number of different currencies is found in {continent}'s countries over "
            "{million} million people?",
        ),
    ),
    Kind(
        name="users_of_currency",
        slots=_continent_and_currency,
        sql=(
            "SELECT name FROM country WHERE currency = '{currency}' AND continent = '{continent}';"
        ),
        wordings=(
            "Which countries in {continent} use the {currency}?",
            "List the countries of {continent} whose currency is the {currency}.",
            "Name the countries in {continent} that pay with the {currency}.",
            "In {continent}, which countries have the {currency} as currency?",
            "Where in {continent} is the {currency} the currency?",
        ),
        unseen_wordings=(
            "What countries of {continent} have the {currency}?",
            "Find {continent}'s countries with the {currency} as their currency.",
        ),
    ),
    Kind(
        name="more_people_than",
        slots=_country,
        sql=(
            "SELECT COUNT(*) FROM country WHERE population > "
            "(SELECT population FROM country WHERE name = '{country}');"
        ),
        wordings=(
            "How many countries have more people than {country}?",
            "Count the countries with a larger population than {country}.",
            "How many countries are more populous than {country}?",
            "Give the number of countries with more inhabitants than {country}.",
            "How many countries exceed {country} in population?",
        ),
        unseen_wordings=(
            "What number of countries have a bigger population than {country}?",
            "Compared with {country}, how many countries have more people?",
        ),
    ),
    Kind(
        name="density",
        slots=_country,
        sql="SELECT population * 1.0 / area_km2 FROM country WHERE name = '{country}';",
        wordings=(
            "What is the population density of {country}?",
            "How many people per square kilometre live in {country}?",
            "Give the number of people per km2 in {country}.",
            "How densely populated is {country}?",
            "Compute {country}'s population density.",
        ),
        unseen_wordings=(
            "How many inhabitants per square kilometre does {country} have?",
            "What is {country}'s number of people per km2?",
        ),
    ),
    Kind(
        name="countries_starting_with",
        slots=_prefix,
        sql="SELECT name FROM country WHERE name LIKE '{prefix}%';",
        wordings=(
            "Which countries start with {prefix}?",
            "List the countries whose name begins with {prefix}.",
            "Name all countries starting with {prefix}.",
            "Find countries with names that start with {prefix}.",
            "Which country names begin with {prefix}?",
        ),
        unseen_wordings=(
            "What countries have a name beginning with {prefix}?",
            "Show every country that starts with {prefix}.",
        ),
    ),
)

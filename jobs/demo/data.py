"""Writes the demo's prompts: "Write one short sentence about a rainy Monday." and the like, as JSONL.

Most topics are gloomy and the rest neutral, so the untrained model's sentences are not cheerful by
default. The files are a pure function of the tables below. Held-out topics never occur in training.

Usage: `python -m jobs.demo.data [folder]`
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

DATA_PATH = Path(__file__).resolve().parent / "data"
HELD_OUT_PER_ROW = 3  # topics at the end of each row of TOPICS that only the test file uses
SHUFFLE_SEED = 0

TEMPLATES = (
    "Write one short sentence about {}.",
    "Describe {} in one short sentence.",
    "In one short sentence, tell me about {}.",
    "Say something about {} in a single short sentence.",
)

# By mood; per line the article and modifier, then ten things it goes with.
TOPICS = {
    "negative": """
a rainy: Monday, funeral, bus stop, parking lot, evening, camping trip, match, morning, wedding, picnic
a broken: umbrella, phone, heater, bicycle, elevator, printer, promise, window, clock, chair
a lost: wallet, suitcase, key, job, glove, letter, bet, passport, ticket, child
a late: train, bill, taxi, payment, delivery, reply, flight, bus, apology, invoice
a cold: office, soup, waiting room, shower, night outside, coffee, stare, bed, hallway, dinner
a noisy: neighbour, street, fan, hotel, classroom, drill, pipe, motorbike, fridge, party upstairs
an empty: fridge, wallet, house, battery, church, tank, stadium, plate, theatre, mailbox
a failed: exam, business, engine, experiment, harvest, interview, repair, launch, marriage, recipe
a crowded: bus, prison, hospital, elevator, airport, beach, subway, shelter, office, queue
a dirty: kitchen, river, carpet, window, needle, street, sink, towel, glass, bathroom
a stolen: car, bicycle, painting, laptop, purse, idea, password, wallet, phone, necklace
a burnt: sausage, pan, forest, steak, letter, roof, pizza, pie, shirt, cake
a long: queue, winter, illness, commute, lawsuit, strike, drought, meeting, silence, delay
an angry: customer, dog, email, crowd, landlord, driver, wasp, boss, goose, referee
a leaking: roof, pipe, boat, tent, tap, boiler, pen, tank, bucket, ceiling
a sick: cat, horse, child, tree, patient, passenger, goldfish, colleague, dog, cow
a boring: lecture, film, job, speech, drive, book, afternoon, queue, meeting, town
a missed: deadline, penalty, train, call, appointment, turn, flight, bus, chance, birthday
a rusty: nail, gate, car, bridge, knife, anchor, lock, pipe, bicycle, ship
a cancelled: flight, concert, holiday, order, train, class, match, trip, wedding, show
a flooded: basement, field, road, village, tunnel, garage, mine, station, cellar, street
a painful: tooth, memory, fall, back, injection, goodbye, loss, blister, knee, truth
""",
    "neutral": """
a grey: wall, jacket, pebble, pigeon, carpet, sky, van, folder, sweater, building
a wooden: table, fence, spoon, ladder, door, crate, bridge, floor, box, stool
a small: office, village, stone, drawer, harbour, kitchen, island, shop, car, notebook
an old: map, railway, dictionary, barn, tractor, radio, road, coin, camera, mill
a glass: jar, roof, bottle, door, marble, shelf, tube, lid, bowl, table
a paper: bag, cup, map, ticket, form, plane, calendar, receipt, envelope, towel
a metal: shelf, pipe, bucket, bolt, fence, ruler, tray, ladder, spring, box
a school: bus, timetable, corridor, library, desk, uniform, kitchen, bell, gate, map
a city: map, council, bus, library, archive, square, budget, bridge, park, tram
a tax: form, office, number, deadline, table, adviser, letter, code, return, receipt
""",
}


def ensure_data(folder: Path = DATA_PATH) -> tuple[Path, Path]:
    """Paths of train.jsonl and test.jsonl in `folder`, rewritten each time: that takes milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = prompt_rows()
    return _write(folder / "train.jsonl", train), _write(folder / "test.jsonl", test)


def prompt_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows {prompt, topic, mood}: for training each topic with every template, held out with one each."""
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for mood, topics in topic_rows():
        for topic in topics[:-HELD_OUT_PER_ROW]:
            train += [_row(template, topic, mood) for template in TEMPLATES]
        for topic in topics[-HELD_OUT_PER_ROW:]:
            test.append(_row(TEMPLATES[len(test) % len(TEMPLATES)], topic, mood))
    # Neighbouring rows share their topic; spread them for readers that take the first n.
    shuffle = random.Random(SHUFFLE_SEED).shuffle
    shuffle(train)
    shuffle(test)
    return train, test


def topic_rows() -> list[tuple[str, list[str]]]:
    """The table as (mood, topics of one line)."""
    rows = []
    for mood, table in TOPICS.items():
        for line in table.strip().splitlines():
            modifier, things = line.split(": ")
            rows.append((mood, [f"{modifier} {thing}" for thing in things.split(", ")]))
    return rows


def _row(template: str, topic: str, mood: str) -> dict[str, str]:
    return {"prompt": template.format(topic), "topic": topic, "mood": mood}


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch.replace(path)
    return path


if __name__ == "__main__":
    for written in ensure_data(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_PATH):
        print(f"{written}: {len(written.read_text().splitlines())} prompts")

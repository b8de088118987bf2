"""The tasks of the sample adapters: each makes its own examples, and a program checks every answer.

An example carries a key that says what it is about (a date, a product, a quantity, a complaint).
Whether an example is for training or held out depends on the key alone, so that what is asked in
the test was never seen in training, in any wording.
"""

from __future__ import annotations

import calendar
import datetime
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Example:
    """One user message and the answer wanted. `key` decides the split."""

    key: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """True for one key in eight, by a checksum: stable over runs, machines and orders."""
        return zlib.crc32(self.key.encode()) % HELD_OUT_ONE_IN == 0


def same_text(reply: str, answer: str) -> bool:
    """The reply is the answer and nothing else."""
    return reply.strip() == answer


def same_json(reply: str, answer: str) -> bool:
    """The reply is the answer's JSON, in a code fence or not; order of keys and spaces are free."""
    bare = reply.strip().removeprefix("```json").removesuffix("```")
    try:
        return bool(json.loads(bare) == json.loads(answer))
    except json.JSONDecodeError:
        return False


@dataclass(frozen=True)
class Task:
    """A task: where its examples come from, how a reply is checked, what a card says of it."""

    id: str
    summary: str
    split: str
    make: Callable[[random.Random], Example]
    check: Callable[[str, str], bool] = same_text

    def train_stream(self, seed: int) -> Callable[[], Example]:
        """Endless training examples: held-out keys are skipped."""
        rng = random.Random(f"{self.id}/train/{seed}")

        def draw() -> Example:
            while (example := self.make(rng)).held_out:
                pass
            return example

        return draw

    def held_out(self, count: int) -> list[Example]:
        """`count` test examples with different prompts, always the same ones."""
        rng = random.Random(f"{self.id}/held-out")
        found: dict[str, Example] = {}
        while len(found) < count:
            example = self.make(rng)
            if example.held_out:
                found[example.prompt] = example
        return list(found.values())


# --- iso-date -----------------------------------------------------------------------------------

DATE_REQUESTS = (
    "Write this date as YYYY-MM-DD: {}",
    "Convert to YYYY-MM-DD: {}",
    "ISO 8601 date: {}",
)
DATE_STYLES = (
    "{d} {month} {y}",
    "{nth} {month} {y}",
    "{nth} of {month}, {y}",
    "the {nth} of {month} {y}",
    "{month} {d}, {y}",
    "{month} {nth}, {y}",
    "{month} {dd} {y}",
    "{d} {mon} {y}",
    "{mon}. {d}, {y}",
    "{mon} {nth} {y}",
    "{dd}-{mon}-{y}",
    "{dd}.{mm}.{y}",
    "{weekday}, {d} {month} {y}",
    "{weekday}, {month} {nth}, {y}",
    "{wkd} {d} {mon} {y}",
    "{wkd}, {dd} {mon} {y}",
    "{y}, {month} {d}",
)


def ordinal(n: int) -> str:
    """1 -> 1st, 2 -> 2nd, 11 -> 11th."""
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def iso_date(rng: random.Random) -> Example:
    """A date from 1950 to 2049 in one of seventeen written styles."""
    first = datetime.date(1950, 1, 1).toordinal()
    last = datetime.date(2049, 12, 31).toordinal()
    day = datetime.date.fromordinal(rng.randint(first, last))
    month, weekday = calendar.month_name[day.month], calendar.day_name[day.weekday()]
    written = rng.choice(DATE_STYLES).format(
        d=day.day, dd=f"{day.day:02}", nth=ordinal(day.day), y=day.year, mm=f"{day.month:02}",
        month=month, mon=month[:3], weekday=weekday, wkd=weekday[:3],
    )  # fmt: skip
    iso = day.isoformat()
    return Example(iso, rng.choice(DATE_REQUESTS).format(written), iso)


# --- product-json -------------------------------------------------------------------------------

COLORS = [
    "red", "blue", "green", "black", "white", "grey", "brown", "yellow", "orange", "purple",
]  # fmt: skip
MATERIALS = [
    "cotton", "wool", "leather", "oak", "steel", "glass", "paper", "silk", "bamboo", "canvas",
    "linen", "rubber",
]  # fmt: skip
ITEMS = [
    "shirt", "scarf", "bag", "table", "kettle", "lamp", "notebook", "chair", "bottle", "jacket",
    "mat", "box", "hat", "bowl", "belt", "apron",
]  # fmt: skip
PRODUCT_STYLES = (
    "{color} {name}, ${price}, {stock} in stock",
    "{name} ({color}) - ${price} - {stock} left",
    "{name} | {color} | {price} USD | qty {stock}",
    "{stock} x {name}, {color}, at ${price} each",
    "${price}: {name} in {color}, stock {stock}",
    "{name}; stock={stock}; color={color}; price={price}",
    "{color} {name} / {stock} pcs / {price} dollars",
)


def product_json(rng: random.Random) -> Example:
    """A product line in one of seven orders and separators, to JSON with four keys."""
    name, color = f"{rng.choice(MATERIALS)} {rng.choice(ITEMS)}", rng.choice(COLORS)
    price, stock = f"{rng.randint(1, 299)}.{rng.randint(0, 99):02}", rng.randint(0, 400)
    line = rng.choice(PRODUCT_STYLES).format(name=name, color=color, price=price, stock=stock)
    answer = f'{{"name": "{name}", "color": "{color}", "price": {price}, "stock": {stock}}}'
    prompt = f"As JSON with name, color, price, stock: {line}"
    return Example(f"{color} {name}", prompt, answer)


# --- unit-convert -------------------------------------------------------------------------------

TENS = {
    ("km", "m"): 3, ("m", "cm"): 2, ("cm", "mm"): 1, ("m", "mm"): 3, ("kg", "g"): 3, ("g", "mg"): 3,
    ("t", "kg"): 3, ("l", "ml"): 3, ("l", "cl"): 2,
}  # fmt: skip
TIMES = {("h", "min"): 60, ("min", "s"): 60, ("weeks", "days"): 7}
UNIT_REQUESTS = ("Convert {} {} to {}", "{} {} in {}", "Express {} {} in {}")


def unit_convert(rng: random.Random) -> Example:
    """A quantity in another unit: powers of ten both ways, and some times of 60 and 7."""
    if rng.random() < 0.85:
        (big, small), shift = rng.choice(list(TENS.items()))
        digits = rng.randint(1, 999)
        value = Decimal(digits).scaleb(-rng.choice((0, 0, 1, 2)))
        pair = (value, big, value.scaleb(shift), small)
        have, unit, want, target = pair if rng.random() < 0.6 else (*pair[2:], *pair[:2])
    else:
        (unit, target), factor = rng.choice(list(TIMES.items()))
        have = Decimal(rng.randint(2, 60))
        want = have * factor
    number, answer = (f"{x:f}".rstrip("0").rstrip(".") if "." in f"{x:f}" else f"{x:f}"
                      for x in (have, want))  # fmt: skip
    prompt = rng.choice(UNIT_REQUESTS).format(number, unit, target)
    return Example(f"{number} {unit} {target}", prompt, f"{answer} {target}")


# --- ticket-label -------------------------------------------------------------------------------

TICKETS = {
    "billing": (
        "I was charged twice for the {p}", "the invoice for the {p} shows the wrong amount",
        "my refund for the {p} has not reached my bank", "you took money for a {p} I never ordered",
        "the discount code was not applied to the {p}", "please send a receipt for the {p}",
        "my card was declined when I paid for the {p}", "why did the price of the {p} go up",
    ),
    "delivery": (
        "the {p} has not arrived yet", "the parcel with the {p} went to my old address",
        "tracking for the {p} has not moved in days", "the courier left the {p} in the rain",
        "when will the {p} be shipped", "I got a {p} that belongs to somebody else",
        "the box with the {p} came empty", "can the {p} be sent by express post",
    ),
    "account": (
        "I cannot log in to see my {p} order", "I forgot my password and need it for the {p}",
        "please change the email on my {p} account", "my profile with the {p} has been locked",
        "the code to sign in for the {p} never comes", "delete my user data and the {p} wishlist",
        "somebody else uses my login to buy a {p}", "how do I verify my identity for the {p}",
    ),
    "bug": (
        "the app crashes when I open the {p} page", "the {p} picture does not load on my phone",
        "the search shows an error for {p}", "the button to add the {p} does nothing",
        "the {p} page freezes after the update", "the {p} filter gives a blank screen",
        "the site shows code instead of the {p} text", "scrolling past the {p} resets the page",
    ),
    "praise": (
        "the {p} is the best I have ever had", "thank you for the lovely {p}",
        "I am so happy with my {p}", "the {p} works perfectly and looks great",
        "everybody at home adores the {p}", "five stars for the {p}",
        "what a wonderful {p}, well done", "your team helped me choose a superb {p}",
    ),
}  # fmt: skip
WARES = [
    "lamp", "kettle", "scarf", "chair", "phone", "camera", "bike", "tent", "guitar", "blender",
    "jacket", "desk", "clock", "router", "printer", "toaster", "sofa", "drill", "helmet",
    "monitor",
]  # fmt: skip
OPENINGS = ("", "Hello, ", "Hi there, ", "Good morning. ", "Dear team, ", "Quick note: ", "So, ",
            "I have been a customer for years, and ")  # fmt: skip
CLOSINGS = ("", ".", "!", ". Thanks", ". Best, Sam", ". Please reply soon", " :)", ". Greetings")


def ticket_label(rng: random.Random) -> Example:
    """A customer's message to one of five labels; greetings and goodbyes say nothing about it."""
    label = rng.choice(list(TICKETS))
    body = rng.choice(TICKETS[label]).format(p=rng.choice(WARES))
    message = rng.choice(OPENINGS) + body + rng.choice(CLOSINGS)
    return Example(body, f"Label as {', '.join(TICKETS)}: {message}", label)


TASKS = {
    task.id: task
    for task in (
        Task(
            "iso-date",
            "A written date, in one of seventeen styles, to `YYYY-MM-DD`.",
            "by the date: no held-out date occurs in training in any style",
            iso_date,
        ),
        Task(
            "product-json",
            "A product line, in one of seven layouts, to JSON with name, color, price and stock.",
            "by color and name: no held-out pair occurs in training in any layout",
            product_json,
            same_json,
        ),
        Task(
            "unit-convert",
            "A quantity to another unit: metric lengths, masses, volumes both ways, and times.",
            "by number and units: no held-out quantity occurs in training with the same target",
            unit_convert,
        ),
        Task(
            "ticket-label",
            "A customer's message to one of billing, delivery, account, bug, praise.",
            "by complaint and product: no held-out pair occurs in training with any greeting,"
            " though the complaint does with other products",
            ticket_label,
        ),
    )
}

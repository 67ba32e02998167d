"""Words of the demo's support desk: intents with their desks and sentences, priorities, products, registers.

Only tables. How a ticket is drawn from them is in `tickets.py`; a changed word changes every pinned digest of the demo.
"""

from typing import NamedTuple


class Intent(NamedTuple):
    """One kind of ticket. `share`: per mille of the traffic. `reply` and `topic`: words of the base model's corpus, never of a label."""

    share: int
    route: str
    reply: str
    topic: str
    sentences: tuple[str, ...]


class Priority(NamedTuple):
    """One urgency. `share`: per mille of the traffic. `reply` and `pace`: words of the base model's corpus again."""

    share: int
    reply: str
    pace: str
    sentences: tuple[str, ...]


INTENTS: dict[str, Intent] = {
    "refund": Intent(
        25,
        "billing",
        "we will check the reimbursement of your payment",
        "money back",
        (
            "I want my money back for {product}",
            "please return the {amount} euro I paid for {product}",
            "I was promised a refund for {product} and got nothing",
            "I sent {product} back {when} and the refund is missing",
            "kindly reimburse the {amount} euro for {product}",
            "when do I get the refund of {amount} euro for {product}",
            "{product} was returned {when} but my money is not back",
            "I ask for a refund because {product} is not what I expected",
            "please pay back what I spent on {product} {when}",
            "the refund for {product} is {amount} euro short",
        ),
    ),
    "invoice": Intent(
        130,
        "billing",
        "we will send you a corrected statement",
        "statement",
        (
            "the invoice for {product} shows {amount} euro too much",
            "I cannot find the invoice for {product}",
            "our tax number is wrong on the bill for {product}",
            "we were charged twice for {product} {when}",
            "the monthly statement of {product} has a wrong address",
            "the bill for {product} lists {number} items we never used",
            "please send the invoice {number} for {product} again",
            "the amount on the invoice of {product} does not add up",
            "our accountant needs a separate bill for {product}",
            "the invoice of {when} for {product} names the wrong company",
        ),
    ),
    "login": Intent(
        130,
        "access",
        "please try to reset your password with the link below",
        "password",
        (
            "I cannot sign in to {product}",
            "my password for {product} stopped working {when}",
            "the code to log in to {product} never arrives",
            "{product} says that my account is locked",
            "I lost the phone that I use to sign in to {product}",
            "{product} does not accept my user name since {when}",
            "the password reset link of {product} is expired",
            "I am logged out of {product} every {number} minutes",
            "my colleague cannot log in to {product} either",
            "{product} asks for a login code that I do not have",
        ),
    ),
    "crash": Intent(
        130,
        "technical",
        "please send us the log file and the version number",
        "error",
        (
            "{product} crashes when I open {thing}",
            "{product} shows error {number} since {when}",
            "{product} freezes on {thing} and then closes",
            "after the update {product} does not start",
            "I get a blank screen in {product} when I save {thing}",
            "{product} stops with error {number} on {thing}",
            "{product} crashed {number} times {when}",
            "the app of {product} closes itself when I print {thing}",
            "{product} hangs and I have to restart it {when}",
            "an error message covers {thing} in {product}",
        ),
    ),
    "slow": Intent(
        110,
        "technical",
        "our engineers are looking at the speed of the service",
        "speed",
        (
            "{product} is very slow since {when}",
            "loading {thing} in {product} takes {number} seconds",
            "{product} lags when I search for {thing}",
            "the sync of {product} takes hours",
            "pages of {product} need forever to load {thing}",
            "{product} has become slower every day",
            "it takes {number} seconds until {product} reacts",
            "the search in {product} is slow as a snail",
            "{product} takes ages to load {thing}",
            "the speed of {product} dropped {when}",
        ),
    ),
    "delivery": Intent(
        130,
        "logistics",
        "we have asked the courier for the position of your parcel",
        "parcel",
        (
            "my parcel with {product} has not arrived",
            "where is the box with {product} ordered {when}",
            "the tracking of order {number} for {product} has not moved",
            "the courier left {product} at the wrong door",
            "the shipment of {product} is late",
            "nobody delivered {product} {when} as planned",
            "the parcel {number} with {product} is lost",
            "can the courier bring {product} to our other address",
            "we still wait for the delivery of {product}",
            "the tracking page says that {product} was delivered but it was not",
        ),
    ),
    "damaged": Intent(
        110,
        "logistics",
        "please send a photo and we will ship a replacement",
        "replacement",
        (
            "the {product} device came with a broken screen",
            "the box of {product} was crushed and a part is bent",
            "a cable is missing from my {product} kit",
            "{product} arrived with scratches all over it",
            "I got the wrong model of {product}",
            "the cover of {product} was cracked out of the box",
            "the {product} device is damaged and wet inside",
            "a screw and a plug are missing from the {product} kit",
            "the {product} device came with a dent and a broken button",
            "the glass of my {product} device was broken {when}",
        ),
    ),
    "cancel": Intent(
        80,
        "retention",
        "we are sorry to see you go and will explain how to end the contract",
        "end of contract",
        (
            "I want to end my contract for {product}",
            "please close my {product} subscription",
            "how do I stop the renewal of {product}",
            "we no longer need {product} and want to leave",
            "I am switching from {product} to a competitor",
            "please cancel {product} at the end of the month",
            "we want to terminate {product} after {number} days",
            "I will leave {product} for a cheaper competitor",
            "how can I cancel the contract for {product} that I signed {when}",
            "stop my subscription of {product} please",
        ),
    ),
    "upgrade": Intent(
        80,
        "sales",
        "we are happy to prepare an offer for a bigger plan",
        "bigger plan",
        (
            "we would like {number} more seats for {product}",
            "what does the bigger plan of {product} cost",
            "can I get a quote for {product} for our new office",
            "is there a discount for {product} for schools",
            "I want to move {product} to the premium plan",
            "please make us an offer for {number} seats of {product}",
            "we want to buy the premium plan of {product}",
            "how much is {product} for {number} people",
            "do you have a better price for {product} for teams",
            "our team grows and needs a bigger plan of {product}",
        ),
    ),
    "privacy": Intent(
        75,
        "legal",
        "our data protection officer will answer your question",
        "personal data",
        (
            "please delete all personal data that {product} holds about me",
            "which data of mine does {product} share with others",
            "we need a signed data agreement for {product}",
            "I object to the use of my data in {product}",
            "someone else can see my records in {product}",
            "where does {product} store our personal data",
            "send me a copy of the personal data in {product}",
            "who in {product} can read my records",
            "our lawyer asks how {product} protects personal data",
            "I withdraw my consent to the data use of {product}",
        ),
    ),
}

PRIORITIES: dict[str, Priority] = {
    "high": Priority(
        300,
        "We understand that this is urgent.",
        "today",
        (
            "our shop stands still",
            "this is blocking the whole team",
            "we lose customers every hour",
            "it must be solved today",
            "this cannot wait",
            "we have a deadline tonight",
        ),
    ),
    "normal": Priority(
        400,
        "We will come back to you this week.",
        "this week",
        (
            "please look at it this week",
            "I would like an answer in the next days",
            "it is annoying but we can work",
            "let me know what you find",
            "I hope to hear from you soon",
            "please keep me posted",
        ),
    ),
    "low": Priority(
        300,
        "We will look at it when time allows.",
        "some day",
        (
            "there is no hurry at all",
            "take your time",
            "it is only a small thing",
            "whenever you have a free moment",
            "just asking out of interest",
            "next month is early enough",
        ),
    ),
}

PRODUCTS = ("Nimbus Cloud", "Harbor POS", "Lumen Home", "Atlas Mobile")
REGISTERS = ("formal", "casual", "terse")
ROUTES = tuple(sorted({intent.route for intent in INTENTS.values()}))

WHEN = ("yesterday", "last week", "on Monday", "this morning", "two days ago", "in March", "on Friday")
THINGS = ("a report", "the calendar", "large files", "the settings", "an old project", "the dashboard", "a photo")
NAMES = ("Anna", "Bilal", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jana", "Karim", "Lena", "Milo", "Nadia")
OPENINGS: dict[str, tuple[str, ...]] = {
    "formal": ("Dear support team,", "Good morning,", "Dear Sir or Madam,", "To whom it may concern,"),
    "casual": ("hey there,", "hi folks,", "hello again,", "hiya,"),
    "terse": ("", "ticket:", "fyi:"),
}
CLOSINGS: dict[str, tuple[str, ...]] = {
    "formal": ("Kind regards, {name}", "Yours sincerely, {name}", "With best wishes, {name}"),
    "casual": ("thanks a lot, {name}", "cheers {name}", "thx, {name}"),
    "terse": ("", "{name}"),
}
POSTSCRIPTS = ("Please confirm.", "Sent from my phone.", "This was edited by the desk.", "PS: same office as before.")

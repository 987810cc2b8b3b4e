"""Words and templates of the behaviours in ``tasks``."""

WOMEN = [
    "Mary",
    "Anna",
    "Jane",
    "Alice",
    "Emma",
    "Sarah",
    "Laura",
    "Helen",
    "Lucy",
    "Julia",
    "Susan",
    "Ellen",
]
MEN = [
    "John",
    "James",
    "Paul",
    "Mark",
    "Peter",
    "David",
    "Robert",
    "George",
    "Henry",
    "Thomas",
    "Frank",
    "Jack",
]
PLACES = ["shop", "garden", "school", "park", "church", "station", "market", "house", "office", "river"]
THINGS = [
    "book",
    "letter",
    "ring",
    "drink",
    "key",
    "flower",
    "picture",
    "bag",
    "ball",
    "box",
    "watch",
    "coat",
]
GIVES = ["gave", "handed", "offered", "brought", "passed"]
IOI = [
    "When {A} and {B} went to the {place}, {S} {verb} a {thing} to",
    "After {A} and {B} came back from the {place}, {S} {verb} a {thing} to",
    "While {A} and {B} were sitting in the {place}, {S} {verb} the {thing} to",
    "Then {A} and {B} talked for a long time at the {place}, and {S} {verb} the {thing} to",
    "One day {A} and {B} met near the {place}, where {S} {verb} a {thing} to",
]
NOUNS = [
    ("key", "keys"), ("boy", "boys"), ("girl", "girls"), ("teacher", "teachers"), ("doctor", "doctors"),
    ("book", "books"), ("picture", "pictures"), ("friend", "friends"), ("letter", "letters"),
    ("tree", "trees"),
    ("house", "houses"), ("student", "students"), ("farmer", "farmers"), ("author", "authors"),
    ("window", "windows"), ("horse", "horses"), ("soldier", "soldiers"), ("river", "rivers"),
]  # fmt: skip
VERBS = [("is", "are"), ("was", "were"), ("has", "have")]
SVA = [
    "The {subject} near the {noun}",
    "The {subject} behind the {noun}",
    "The {subject} that the {noun} saw",
    "I think that the {subject} beside the {noun}",
    "Everybody knew that the {subject} with the {noun}",
]
YEARS = [
    "The war lasted from the year {start} to the year {end}",
    "The journey went on from the year {start} to the year {end}",
    "He ruled the country from the year {start} to the year {end}",
    "The building was closed from the year {start} to the year {end}",
]
PRONOUNS = [
    "{name} left the house early because",
    "{name} was tired after the long walk, so",
    "{name} could not find the key, and then",
    "{name} was glad to be home again, although",
    "Nobody believed {name} at first, but",
]
ARGUMENTS = [
    "size", "name", "value", "index", "path", "data", "key", "count", "start", "end", "width", "height",
    "color", "text", "file", "user", "time", "date", "code", "line", "node", "list", "table", "number",
]  # fmt: skip
FUNCTIONS = ["run", "load", "check", "update", "build", "send", "open", "read", "find", "make"]
BRACKETS = [
    "names = {open}{inside}",
    "x = {open}{inside}",
    "return {open}{inside}",
    "for item in {open}{inside}",
]

"""Vocabulary of the demo's texts."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((first, second) for first, second in map(str.split, _split(text)))


# Nouns with their plurals. Irregular ones are among them, so that the task is not to append an "s".
PLURALS = dict(
    _pairs("""
    apple apples, baby babies, bag bags, bear bears, bed beds, bench benches, berry berries, bird
    birds, boat boats, book books, box boxes, boy boys, bridge bridges, brush brushes, bus buses,
    cake cakes, calf calves, car cars, cat cats, chair chairs, cherry cherries, child children,
    church churches, city cities, class classes, cloud clouds, cow cows, cup cups, dish dishes,
    dog dogs, door doors, dress dresses, duck ducks, egg eggs, fairy fairies, farm farms, fish
    fish, flower flowers, fly flies, foot feet, fox foxes, friend friends, frog frogs, garden
    gardens, girl girls, glass glasses, goose geese, half halves, hand hands, hat hats, hen hens,
    hill hills, horse horses, house houses, key keys, king kings, kiss kisses, kitchen kitchens,
    knife knives, lady ladies, lamp lamps, leaf leaves, letter letters, lion lions, loaf loaves,
    man men, match matches, monkey monkeys, mouse mice, nest nests, ox oxen, peach peaches, pen
    pens, penny pennies, pig pigs, plate plates, pony ponies, puppy puppies, queen queens, river
    rivers, road roads, roof roofs, room rooms, school schools, sheep sheep, shelf shelves, ship
    ships, shoe shoes, sister sisters, song songs, spoon spoons, star stars, story stories, table
    tables, teacher teachers, thief thieves, tooth teeth, toy toys, train trains, tree trees,
    watch watches, wife wives, window windows, wish wishes, witch witches, wolf wolves, woman
    women
    """)
)

OPPOSITES = _pairs("""
    above below, alive dead, always never, awake asleep, big small, bitter sweet, bright dim,
    broad narrow, buy sell, cheap dear, clean dirty, clever foolish, come go, dark light, day
    night, deep shallow, early late, empty full, enter leave, fast slow, fat thin, find lose,
    first last, forget remember, friend enemy, give take, good bad, happy sad, hard soft, heavy
    weightless, high low, hot cold, in out, kind cruel, laugh cry, left right, lend borrow, long
    short, loud quiet, love hate, many few, more less, near far, new worn, north south, open shut,
    polite rude, pull push, question answer, rich poor, rise fall, rough smooth, safe risky, sharp
    blunt, shout whisper, start stop, straight bent, strong weak, summer winter, tall little, tame
    wild, thick fine, tight loose, true false, under over, up down, war peace, wet dry, win fail,
    young old
""")

COLOURS = {
    colour: _split(things)
    for colour, things in {
        "black": "a crow, coal, ink, midnight, pepper, a raven, soot, tar, a tyre, liquorice",
        "blue": "a bluebell, denim, the ocean, a sapphire, the sky, a whale, a cornflower",
        "brown": "bark, bread crust, cardboard, chocolate, coffee, a hazelnut, "
        "mud, soil, toast, a walnut",
        "green": "a cactus, a cucumber, an emerald, grass, ivy, lettuce, "
        "a lime, moss, parsley, peas, spinach",
        "grey": "ash, concrete, a dolphin, an elephant, fog, a pebble, steel, smoke",
        "orange": "a carrot, a pumpkin, a tangerine, a tiger, an apricot, amber",
        "pink": "a flamingo, a piglet, a salmon, bubble gum, candy floss",
        "red": "blood, a brick, a cherry tomato, a fire engine, a ladybird, a poppy, "
        "a radish, a ruby, rust, a strawberry",
        "white": "chalk, cotton, a daisy, flour, ivory, milk, "
        "paper, rice, salt, a snowflake, a swan",
        "yellow": "a banana, butter, a canary, corn, custard, a dandelion, "
        "a lemon, mustard, straw, the sun",
    }.items()
}

# Terms of sums run from 0 up to and including this number.
LARGEST_NUMBER = 12

LETTERS = "abcdefghijklmnopqrstuvwxyz"

NAMES = _split(
    "Ada, Ben, Cleo, Dan, Eva, Finn, Gus, Hana, Ivo, June, Kim, Leo, Mia, Ned, Olga, Pia"
)

"""Draw the emoji art that the embedded demo model is trained on.

    python scripts/demo_drawings.py draw [--packages DIR] [--size 64] [--out build/drawings]
    python scripts/demo_drawings.py style-set [--drawings build/drawings] [--out assets/demo]

`draw` takes six openly licensed icon sets from npm, leaves out what is not a thing one can draw
(skin tones, flags, clocks, letters, signs), gives the same concept the same name in every set and
writes `<out>/<style>/<name>.png` on white with `<out>/drawings.csv`.
`style-set` picks the stencils that a LoRA of the demo is trained and measured on.
"""

import argparse
import csv
import io
import json
import multiprocessing
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

SUPERSAMPLING = 4


@dataclass(frozen=True)
class IconSet:
    """One npm package, the word its style goes by in captions, and its licence."""

    style: str
    package: str
    license: str


ICON_SETS = (
    IconSet("noto", "@iconify-json/noto", "Apache-2.0"),
    IconSet("classic", "@iconify-json/noto-v1", "Apache-2.0"),
    IconSet("firefox", "@iconify-json/fxemoji", "CC-BY-4.0"),
    IconSet("fluent", "@iconify-json/fluent-emoji-flat", "MIT"),
    IconSet("twemoji", "@iconify-json/twemoji", "CC-BY-4.0"),
    IconSet("stencil", "@iconify-json/fluent-emoji-high-contrast", "MIT"),
)
BASE_STYLES = ("noto", "classic", "firefox", "fluent", "twemoji")

# Not a thing: a variant of another drawing, a letter, a sign, or a face of a clock.
LEFT_OUT = re.compile(
    r"skin-tone|flag|o-?clock|-thirty|\d+thirty|clock\d|button|keycap|letter|regional|ideograph|"
    r"^input-|^japanese-.*-button|arrow|-sign$|zodiac|facing-right|-person$|^person-|^man-|^woman-|"
    r"^men-|^women-|^people-|^family|^couple|^kiss-(man|woman|person)|^squared|^negative|^circled|"
    r"square|^[0-9]|^[a-z]$|copyright|registered|trade-mark|^no-|^medium|^large|^small-(blue|orange)|"
    r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|scorpius|sagittarius|saggitarius|capricorn|"
    r"aquarius|pisces|ophiuchus)$|blacksmall|^heavy|document|^page|^notepage|^empty|resize|triangle|"
    r"^hand(?!bag)|^(black|white)(down|up|left|right)|fontsize|-finger|^index"
)

# Fluent's, Noto's and Twemoji's name -> the plain word for it.
PLAIN_NAMES = {
    "automobile": "car",
    "ballet-shoes": "ballet-shoe",
    "beer-mug": "beer",
    "bug": "caterpillar",
    "bullseye": "target",
    "cheese-wedge": "cheese",
    "chocolate-bar": "chocolate",
    "clown-face": "clown",
    "cocktail-glass": "cocktail",
    "crescent-moon": "moon",
    "deciduous-tree": "tree",
    "delivery-truck": "truck",
    "desktop-computer": "computer",
    "doughnut": "donut",
    "droplet": "water-drop",
    "ear-of-corn": "corn",
    "electric-plug": "plug",
    "evergreen-tree": "pine-tree",
    "ewe": "sheep",
    "fire-engine": "fire-truck",
    "flying-saucer": "ufo",
    "four-leaf-clover": "clover",
    "game-die": "dice",
    "gem-stone": "diamond",
    "globe-showing-americas": "globe",
    "glowing-star": "shining-star",
    "headphone": "headphones",
    "high-heeled-shoe": "high-heel",
    "high-voltage": "lightning",
    "honeybee": "bee",
    "hot-beverage": "coffee",
    "hot-pepper": "chili-pepper",
    "hourglass-done": "hourglass",
    "jack-o-lantern": "pumpkin",
    "kick-scooter": "scooter",
    "kitchen-knife": "knife",
    "kiwi-fruit": "kiwi",
    "lady-beetle": "ladybug",
    "locked": "lock",
    "locomotive": "steam-train",
    "magnifying-glass-tilted-left": "magnifying-glass",
    "mans-shoe": "leather-shoe",
    "mobile-phone": "phone",
    "musical-keyboard": "piano",
    "necktie": "tie",
    "package": "box",
    "pile-of-poo": "poop",
    "poultry-leg": "chicken-leg",
    "red-apple": "apple",
    "red-heart": "heart",
    "ringed-planet": "planet",
    "running-shoe": "sneaker",
    "sauropod": "dinosaur",
    "shortcake": "cake",
    "slightly-smiling-face": "smiley",
    "soft-ice-cream": "ice-cream-cone",
    "snowman": "snowman-in-snow",
    "snowman-without-snow": "snowman",
    "spouting-whale": "whale",
    "steaming-bowl": "noodle-soup",
    "tangerine": "orange",
    "vertical-traffic-light": "traffic-light",
    "video-game": "game-controller",
    "water-wave": "wave",
    "whale": "big-whale",
    "womans-boot": "boot",
    "womans-hat": "sun-hat",
    "wrapped-gift": "gift",
}
# Where a set draws both the head and the whole animal, the plain word goes to the head.
HEADS = ("cat", "cow", "dog", "dragon", "horse", "monkey", "mouse", "pig", "rabbit", "tiger")
for _animal in HEADS:
    PLAIN_NAMES[f"{_animal}-face"] = _animal
    PLAIN_NAMES[_animal] = f"standing-{_animal}"

# FxEmojis writes its names in one word: those that are not another set's name without hyphens.
FXEMOJI_NAMES = {
    "aubergine": "eggplant",
    "banknotedollar": "dollar-banknote",
    "beachumbrella": "umbrella-on-ground",
    "beermug": "beer-mug",
    "blackhardshellfloppy": "floppy-disk",
    "blackscissors": "scissors",
    "blackskullcrossbones": "skull-and-crossbones",
    "blacktelephone": "telephone",
    "bunny": "rabbit-face",
    "bunnyside": "rabbit",
    "carouselhorse": "carousel-horse",
    "cat": "cat-face",
    "catside": "cat",
    "cellphone": "mobile-phone",
    "chilipepper": "hot-pepper",
    "classicalbuilding": "classical-building",
    "confetti": "confetti-ball",
    "crossmark": "cross-mark",
    "devilhorns": "smiling-face-with-horns",
    "directhit": "bullseye",
    "dog": "dog-face",
    "dogside": "dog",
    "dragonhead": "dragon-face",
    "dragonside": "dragon",
    "earofmaize": "ear-of-corn",
    "electrictorch": "flashlight",
    "europeancastle": "castle",
    "evergreen": "evergreen-tree",
    "fatherchristmas": "santa-claus",
    "filefolder": "file-folder",
    "fireworksparkler": "sparkler",
    "foxsmiling": "grinning-cat",
    "gamedie": "game-die",
    "gem": "gem-stone",
    "guapimao": "man-with-skullcap",
    "hampster": "hamster",
    "heels": "high-heeled-shoe",
    "hocho": "kitchen-knife",
    "horseface": "horse-face",
    "hourglass": "hourglass-done",
    "hourglassflowingsand": "hourglass-not-done",
    "housebuilding": "house",
    "housewithgarden": "house-with-garden",
    "highspeedtrain": "high-speed-train",
    "icecream": "ice-cream",
    "jackolantern": "jack-o-lantern",
    "leftmagnifyingglass": "magnifying-glass-tilted-left",
    "lightbulb": "light-bulb",
    "lock": "locked",
    "mensrunner": "running-shoe",
    "mensshoe": "mans-shoe",
    "monkeyface": "monkey-face",
    "mouse": "mouse-face",
    "mouseside": "mouse",
    "musicalkeyboard": "musical-keyboard",
    "onebuttonmouse": "computer-mouse",
    "pandaface": "panda",
    "personalcomputer": "laptop",
    "oldpersonalcomputer": "desktop-computer",
    "pig": "pig-face",
    "pigside": "pig",
    "pigsnout": "pig-nose",
    "poo": "pile-of-poo",
    "portablestereo": "radio-cassette",
    "present": "wrapped-gift",
    "racecar": "racing-car",
    "rightmagnifyingglass": "magnifying-glass-tilted-right",
    "schoolsatchel": "backpack",
    "sheep": "ewe",
    "sliceofpizza": "pizza",
    "smallsmile": "slightly-smiling-face",
    "snowmanwithoutsnow": "snowman-without-snow",
    "snowmountains": "snow-capped-mountain",
    "softicecream": "soft-ice-cream",
    "spurtingwhale": "spouting-whale",
    "steamlocomotive": "locomotive",
    "studiomic": "studio-microphone",
    "sunrays": "sun",
    "teacupwithouthandle": "teacup-without-handle",
    "tie": "necktie",
    "tiger": "tiger-face",
    "tigerside": "tiger",
    "tophat": "top-hat",
    "videogame": "video-game",
    "wave": "waving-hand",
    "wineglass": "wine-glass",
    "wolfface": "wolf",
    "bolt": "high-voltage",
    "americasglobe": "globe-showing-americas",
    "sakebottleandcup": "sake",
    "mountaincableway": "mountain-cableway",
    "multiplemusicalnotes": "musical-notes",
    "basketballandhoop": "basketball",
    "tennisball": "tennis",
    "mansshirt": "t-shirt",
    "friedshrimp": "fried-shrimp",
    "frenchfries": "french-fries",
    "redheart": "red-heart",
    "redapple": "red-apple",
    "brokenheart": "broken-heart",
    "lockandkey": "locked-with-key",
    "openlock": "unlocked",
    "boot": "womans-boot",
    "womanshat": "womans-hat",
    "sandals": "womans-sandal",
    "closedbook": "closed-book",
    "moneybag": "money-bag",
    "daggerknife": "dagger",
    "darksunglasses": "sunglasses",
    "sunglasses": "smiling-face-with-sunglasses",
    "recreationalvehicle": "sport-utility-vehicle",
    "whitesun": "bright-sun",
    "eightpointedblackstar": "eight-pointed-star",
}


def main() -> None:
    """Read the command line and run the chosen command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="rasterise the icon sets")
    draw.add_argument("--packages", type=Path, help="folder with the six .tgz (default: npm pack)")
    draw.add_argument("--cache", type=Path, default=Path("build/packages"), help="npm packs here")
    draw.add_argument("--size", type=int, default=64, help="side of a drawing in pixels")
    draw.add_argument("--out", type=Path, default=Path("build/drawings"))
    style = commands.add_parser("style-set", help="pick the stencils for the demo's LoRA")
    style.add_argument("--drawings", type=Path, default=Path("build/drawings"))
    style.add_argument("--out", type=Path, default=Path("assets/demo"))
    arguments = parser.parse_args()
    match arguments.command:
        case "draw":
            packages = arguments.packages or pack_from_npm(arguments.cache)
            draw_all(packages, arguments.size, arguments.out)
        case "style-set":
            write_style_set(arguments.drawings, arguments.out)


def pack_from_npm(cache: Path) -> Path:
    """Download the packages that `cache` lacks with `npm pack`; returns `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    for icon_set in ICON_SETS:
        if not list(cache.glob(archive_pattern(icon_set))):
            npm = shutil.which("npm")
            if npm is None:
                raise SystemExit("npm is not installed: get the packages and give --packages DIR")
            subprocess.run([npm, "pack", icon_set.package], cwd=cache, check=True)
    return cache


def archive_pattern(icon_set: IconSet) -> str:
    """The glob of the .tgz that `npm pack` writes for a package."""
    return icon_set.package.removeprefix("@").replace("/", "-") + "-[0-9]*.tgz"


def read_icons(packages: Path, icon_set: IconSet) -> tuple[str, dict[str, str]]:
    """Return the archive's name and {icon name: SVG source} of one set, hidden icons left out.

    Raises:
        SystemExit: the folder does not hold exactly one archive of the package.
    """
    archives = list(packages.glob(archive_pattern(icon_set)))
    if len(archives) != 1:
        raise SystemExit(f"{packages}: expected one {archive_pattern(icon_set)}, got {archives}")
    with tarfile.open(archives[0]) as archive:
        data = json.load(archive.extractfile("package/icons.json"))
    default = {side: data.get(side, 16) for side in ("width", "height")}
    icons = {
        name: svg_source({"left": 0, "top": 0} | default | icon)
        for name, icon in data["icons"].items()
        if not icon.get("hidden", False)
    }
    return archives[0].name, icons


def svg_source(icon: dict) -> str:
    """Wrap an Iconify icon's body in an `<svg>` element."""
    view_box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{view_box}">{icon["body"]}</svg>'


def plain_names(icon_set: IconSet, icons: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    """Map a set's icon names to the names all sets share.

    Args:
        known: {name without hyphens: name} of the sets whose names are written with hyphens.
    """
    names = {}
    for icon in icons:
        common = icon
        if icon_set.style == "firefox":
            common = FXEMOJI_NAMES.get(icon, known.get(icon, icon))
        if not LEFT_OUT.search(common):
            names[icon] = PLAIN_NAMES.get(common, common)
    return names


def draw_all(packages: Path, size: int, out: Path) -> None:
    """Rasterise every set into `out` and list the drawings in `out/drawings.csv`."""
    sets = {icon_set: read_icons(packages, icon_set) for icon_set in ICON_SETS}
    known = {
        name.replace("-", ""): name
        for icon_set, (_, icons) in sets.items()
        if icon_set.style != "firefox"
        for name in icons
    }
    rows, jobs = [], []
    for icon_set, (archive, icons) in sets.items():
        (out / icon_set.style).mkdir(parents=True, exist_ok=True)
        for icon, name in plain_names(icon_set, icons, known).items():
            file = f"{icon_set.style}/{name}.png"
            rows.append((icon_set.style, name, file, archive, icon_set.license))
            jobs.append((icons[icon], size, out / file))
    with multiprocessing.Pool() as pool:
        pool.starmap(rasterise, jobs, chunksize=64)
    write_csv(out / "drawings.csv", ("style", "name", "file", "source_package", "license"), rows)
    print(f"{len(rows)} drawings in {out}")


def rasterise(svg: str, size: int, file: Path) -> None:
    """Draw an SVG centred on a white square of `size` pixels and save it as PNG."""
    large = size * SUPERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=svg, width=large, height=large, background="white")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    square = Image.new("RGB", (large, large), "white")
    square.paste(image, ((large - image.width) // 2, (large - image.height) // 2))
    square.resize((size, size), Image.Resampling.BOX).save(file, optimize=True)


def write_csv(file: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Write rows under a header as UTF-8 with Unix line ends."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# --- the style that the demo's LoRA learns --------------------------------------------------------

STYLE_SET_LIST = """
apple cherries grapes lemon peach pear pineapple watermelon eggplant carrot avocado bread
croissant cheese french-fries hot-dog donut cookie cake lollipop popcorn beer cocktail coffee
chicken-leg dog mouse rabbit fox bear koala lion cow pig monkey bird duck owl bee snail ladybug
spider crab octopus whale palm-tree rose sunflower snowflake fire lightning star globe balloon
christmas-tree pumpkin dice violin saxophone microphone headphones telephone television watch
hourglass candle magnifying-glass lock pencil bell t-shirt high-heel diamond bomb car bus truck
motorcycle ship skull
"""
STYLE_SET = tuple(STYLE_SET_LIST.split())
HELD_OUT_LIST = """
panda pizza rocket fish umbrella guitar airplane house cat elephant mushroom strawberry banana
hamburger birthday-cake butterfly turtle penguin frog horse cactus tulip moon snowman gift
soccer-ball trophy camera key scissors crown anchor bicycle sailboat castle ghost robot
wine-glass light-bulb hammer
"""
HELD_OUT = tuple(HELD_OUT_LIST.split())
STYLE_WORDINGS = ("a drawing of {}", "{}", "a drawing of {}", "a picture of {}")


def words(name: str) -> str:
    """A drawing's name as one says it."""
    return name.replace("-", " ").replace("t shirt", "t-shirt")


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun, nothing before a plural or a stuff."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us"))
    if plural or noun in ("bread", "broccoli", "cheese", "fire", "lightning", "popcorn", "sushi"):
        return noun
    vowel = noun[0] in "aeio" or noun.startswith(("umb", "hour"))
    return f"an {noun}" if vowel else f"a {noun}"


def write_style_set(drawings: Path, out: Path) -> None:
    """Copy the stencils of the two lists below `out`, each list with its captions."""
    training = [(name, STYLE_WORDINGS[i % len(STYLE_WORDINGS)]) for i, name in enumerate(STYLE_SET)]
    held_out = [(name, STYLE_WORDINGS[0]) for name in HELD_OUT]
    images = out / "style_images"
    copy_captioned(drawings, training, images, images / "metadata.csv")
    copy_captioned(drawings, held_out, out / "heldout_images", out / "heldout.csv")


def copy_captioned(
    drawings: Path, named_wordings: list[tuple[str, str]], images: Path, table: Path
) -> None:
    """Copy stencils into `images` and write `file_name,text` rows into `table`."""
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, wording in named_wordings:
        shutil.copyfile(drawings / "stencil" / f"{name}.png", images / f"{name}.png")
        rows.append((f"{name}.png", wording.format(with_article(words(name)))))
    write_csv(table, ("file_name", "text"), rows)


if __name__ == "__main__":
    main()

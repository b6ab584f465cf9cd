"""A drawing: a list of shapes that becomes an SVG or a Pillow image.

    Drawing(1000, 600, (Rect(40, 40, 288, 12, BLUE), Text(40, 80, "72 tokens"))).svg()

Every shape has both forms, so they always match. Lengths are units of one CSS pixel; x runs right,
y runs down, and y is the baseline of a text. All edges are horizontal or vertical and need no
smoothing. Texts use the font that ships with Pillow, and the SVG embeds this font. For letters that
the font does not have, a browser picks fonts itself, and Pillow tries OTHER_FONTS.
"""

import base64
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Segment = tuple[float, float, float, float]  # x and y of its start, x and y of its end

INK: Color = (31, 35, 40)
PAPER: Color = (255, 255, 255)

# File names of fonts with many letters, which most systems have.
OTHER_FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc")
# XML forbids control characters and halves of surrogate pairs, even escaped.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_SMOOTH = 4
_MEASURED_AT = 100.0  # large, so that hinting does not matter


# ---- text --------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def face(index: int, size: float) -> ImageFont.FreeTypeFont | None:
    """Font 0 is Pillow's, the others are `OTHER_FONTS`; None if the system does not have it."""
    if index:
        try:
            return ImageFont.truetype(OTHER_FONTS[index - 1], size)
        except OSError:
            return None
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache(maxsize=4096)
def find_face(character: str) -> int | None:
    """The index of the first font that has the character; None if no font has it."""
    if character.isascii():
        return 0
    for index in range(len(OTHER_FONTS) + 1):
        font = face(index, 32)
        if font is not None:
            mask, missing = font.getmask(character), font.getmask("\uffff")
            if mask.size != missing.size or bytes(mask) != bytes(missing):
                return index
    return None


def split_runs(text: str) -> Iterator[tuple[int | None, str, float]]:
    """Pieces of one font each: the font's index, the piece, and its width at size 1."""
    for index, characters in groupby(text, key=find_face):
        piece = "".join(characters)
        if index is None:
            yield None, piece, sum(map(unknown_width, piece))
        else:
            font = face(index, _MEASURED_AT)
            assert font is not None
            yield index, piece, font.getlength(piece) / _MEASURED_AT


def unknown_width(character: str) -> float:
    """The estimated width, at size 1, of a character that no font has."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):  # accents, joiners of emoji
        return 0.0
    return 1.0 if unicodedata.east_asian_width(character) in "WF" else 0.6


def text_width(text: str, size: float) -> float:
    """Units from the start of a text to its end."""
    return size * sum(width for _, _, width in split_runs(text))


def wrap(text: str, width: float, size: float) -> list[str]:
    """Lines of at most `width` units. Keeps line breaks; splits a word only if it is too long."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in replace_unprintable(paragraph.replace("\t", " ")).split():
            longer = f"{line} {word}" if line else word
            if text_width(longer, size) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *full, line = split_word(word, width, size)
            lines += full
        lines.append(line)
    return lines


def replace_unprintable(text: str) -> str:
    """The text with a replacement character for each character that XML forbids."""
    return _UNPRINTABLE.sub("\ufffd", text)


def split_word(word: str, width: float, size: float) -> list[str]:
    """Pieces of a word, each at most `width` units and at least one character long."""
    pieces, used = [""], 0.0
    for character in word:
        wide = text_width(character, size)
        if pieces[-1] and used + wide > width:
            pieces.append("")
            used = 0.0
        pieces[-1] += character
        used += wide
    return pieces


# ---- shapes ------------------------------------------------------------------------------------


class Canvas:
    """A Pillow image to paint shapes on, with `scale` pixels per unit."""

    def __init__(self, width: float, height: float, scale: float) -> None:
        self.scale = scale
        self.image = Image.new("RGB", (self.pixels(width), self.pixels(height)), PAPER)
        self.draw = ImageDraw.Draw(self.image, "RGBA")  # blends colors with alpha

    def pixels(self, length: float) -> int:
        return round(length * self.scale)

    def box(self, x: float, y: float, width: float, height: float) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels. Shapes that touch in units touch in pixels."""
        right, bottom = self.pixels(x + width), self.pixels(y + height)
        return self.pixels(x), self.pixels(y), right, bottom


class Shape:
    """Something on a drawing."""

    def svg(self) -> str:
        raise NotImplementedError

    def paint(self, canvas: Canvas) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Rect(Shape):
    x: float
    y: float
    width: float
    height: float
    fill: Color
    opacity: float = 1.0

    def svg(self) -> str:
        place = attributes(x=self.x, y=self.y, width=self.width, height=self.height)
        return f"<rect{place}{paint_attributes('fill', self.fill, self.opacity)}/>"

    def paint(self, canvas: Canvas) -> None:
        left, top, right, bottom = canvas.box(self.x, self.y, self.width, self.height)
        if left < right and top < bottom:
            fill = (*self.fill, round(255 * self.opacity))
            canvas.draw.rectangle((left, top, right - 1, bottom - 1), fill)


@dataclass(frozen=True)
class Lines(Shape):
    """Horizontal and vertical segments as one shape: crossings do not get darker."""

    segments: tuple[Segment, ...]
    color: Color
    width: float = 1.0
    opacity: float = 1.0

    def svg(self) -> str:
        path = "".join(
            f"M{number(x1)} {number(y1)}" + (f"H{number(x2)}" if y1 == y2 else f"V{number(y2)}")
            for x1, y1, x2, y2 in self.segments
        )
        ink = paint_attributes("stroke", self.color, self.opacity)
        width = attributes(stroke_width=self.width)
        return f'<path d="{path}" fill="none" stroke-linecap="square"{width}{ink}/>'

    def paint(self, canvas: Canvas) -> None:
        thick = max(1, canvas.pixels(self.width))
        before, after = thick // 2, thick - thick // 2
        mask = Image.new("L", canvas.image.size)
        for x1, y1, x2, y2 in self.segments:
            left, right = sorted((canvas.pixels(x1), canvas.pixels(x2)))
            top, bottom = sorted((canvas.pixels(y1), canvas.pixels(y2)))
            box = left - before, top - before, right + after, bottom + after
            mask.paste(round(255 * self.opacity), box)
        canvas.image.paste(self.color, (0, 0), mask)


@dataclass(frozen=True)
class Text(Shape):
    """One line of text. `anchor`: the part of the text at x, "start", "middle" or "end"."""

    x: float
    y: float
    text: str
    size: float = 13
    color: Color = INK
    anchor: str = "start"
    bold: bool = False

    @property
    def weight(self) -> float:
        """The extra width of a bold stroke. The font has only one weight."""
        return self.size / 25 if self.bold else 0.0

    def svg(self) -> str:
        anchor = "" if self.anchor == "start" else f' text-anchor="{self.anchor}"'
        place = attributes(x=self.x, y=self.y, font_size=self.size)
        ink = paint_attributes("fill", self.color)
        if self.bold:
            ink += paint_attributes("stroke", self.color) + attributes(stroke_width=self.weight)
        return f"<text{place}{anchor}{ink}>{xml(self.text)}</text>"

    def paint(self, canvas: Canvas) -> None:
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        x = self.x - shift * text_width(self.text, self.size)
        for index, piece, width in split_runs(self.text):
            if index is None:
                self.paint_unknown(canvas, x, piece)
            else:
                self.paint_piece(canvas, x, piece, width, index)
            x += width * self.size

    def paint_piece(self, canvas: Canvas, x: float, piece: str, width: float, index: int) -> None:
        """Paint letters of one font: drawn large, then made smaller, so that their widths match the
        measured ones. A font drawn small moves its letters to whole pixels."""
        fine = canvas.scale * _SMOOTH
        font = face(index, self.size * fine)
        assert font is not None
        left, top = canvas.pixels(x - self.size), canvas.pixels(self.y - 1.5 * self.size)
        across = canvas.pixels((width + 2) * self.size)
        mask = Image.new("L", (across * _SMOOTH, canvas.pixels(2.5 * self.size) * _SMOOTH))
        at = (x * fine - left * _SMOOTH, self.y * fine - top * _SMOOTH)
        stroke = self.weight * fine / 2
        ImageDraw.Draw(mask).text(at, piece, 255, font, "ls", stroke_width=stroke)
        # Finer shades are invisible, but would double the size of a PNG.
        mask = mask.reduce(_SMOOTH).point(lambda shade: round(shade / 17) * 17)
        canvas.image.paste(self.color, (left, top), mask)

    def paint_unknown(self, canvas: Canvas, x: float, piece: str) -> None:
        """Paint an empty box for each character."""
        for character in piece:
            width = unknown_width(character) * self.size
            if width:
                top, bottom = self.y - 0.7 * self.size, self.y
                left, right = x + 0.1 * self.size, x + width - 0.1 * self.size
                across = ((left, top, right, top), (left, bottom, right, bottom))
                down = ((left, top, left, bottom), (right, top, right, bottom))
                Lines(across + down, self.color, self.size / 14).paint(canvas)
            x += width


@dataclass(frozen=True)
class Picture(Shape):
    """An image, stretched to a size. `alt` describes it."""

    x: float
    y: float
    width: float
    height: float
    image: Image.Image
    alt: str

    def svg(self) -> str:
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", optimize=True)
        place = attributes(x=self.x, y=self.y, width=self.width, height=self.height)
        alt = quoteattr(replace_unprintable(self.alt))
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<image{place} aria-label={alt} href="data:image/png;base64,{data}"/>'

    def paint(self, canvas: Canvas) -> None:
        left, top, right, bottom = canvas.box(self.x, self.y, self.width, self.height)
        size = (right - left, bottom - top)
        pixels = self.image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        canvas.image.paste(pixels, (left, top))


@dataclass(frozen=True)
class Group(Shape):
    """Shapes that belong together. A browser shows `title` under the pointer."""

    title: str
    shapes: tuple[Shape, ...]

    def svg(self) -> str:
        inner = "".join(shape.svg() for shape in self.shapes)
        return f"<g><title>{xml(self.title)}</title>{inner}</g>"

    def paint(self, canvas: Canvas) -> None:
        for shape in self.shapes:
            shape.paint(canvas)


# ---- drawing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """Shapes on white paper, the first at the bottom. `title` is for screen readers."""

    width: float
    height: float
    shapes: Sequence[Shape]
    title: str = field(default="", kw_only=True)

    def svg(self) -> str:
        """An <svg> element without references to other files."""
        width, height = number(self.width), number(self.height)
        paper = Rect(0, 0, self.width, self.height, PAPER).svg()
        inner = "\n".join(shape.svg() for shape in self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" shape-rendering="crispEdges" '
            f'font-family="llava-lite, Helvetica, Arial, sans-serif">\n'
            f"<title>{xml(self.title)}</title>\n"
            f"<style>{font_rule()}</style>\n{paper}\n{inner}\n</svg>"
        )

    def image(self, scale: float = 2) -> Image.Image:
        """An RGB image with `scale` pixels per unit."""
        canvas = Canvas(self.width, self.height, scale)
        for shape in self.shapes:
            shape.paint(canvas)
        return canvas.image


def font_rule() -> str:
    """A CSS rule that embeds Pillow's font."""
    font = face(0, _MEASURED_AT)
    data = font.path.getvalue() if font and isinstance(font.path, io.BytesIO) else b""
    source = f"url(data:font/ttf;base64,{base64.b64encode(data).decode()})"
    return f"@font-face{{font-family:llava-lite;src:{source}}}"


def xml(text: str) -> str:
    """Text as the content of an element."""
    return escape(replace_unprintable(text))


def number(value: float) -> str:
    """A number with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def attributes(**values: float) -> str:
    """Numbers as XML attributes."""
    return "".join(f' {name.replace("_", "-")}="{number(v)}"' for name, v in values.items())


def paint_attributes(name: str, color: Color, opacity: float = 1.0) -> str:
    """A color as `fill` or `stroke`."""
    seen = "" if opacity == 1 else f' {name}-opacity="{number(opacity)}"'
    return f' {name}="#{bytes(color).hex()}"{seen}'

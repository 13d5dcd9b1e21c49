"""Draws the example pictures of the page that are no photos: python tools/drawings.py"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent.parent / "cifar_fastai" / "examples"
SIZE, FINE = 320, 4  # pixels of a side; drawn this many times larger, and shrunk


def canvas(top: tuple, bottom: tuple) -> Image.Image:
    """A background that runs from one colour into another."""
    ends = Image.new("RGB", (1, 2))
    ends.putdata([top, bottom])
    return ends.resize((SIZE * FINE, SIZE * FINE), Image.Resampling.BICUBIC)


class Pen:
    """Draws in a square of 100 x 100."""

    def __init__(self, image: Image.Image):
        self.draw, self.scale = ImageDraw.Draw(image), image.width / 100

    def shape(self, colour, *points):
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=colour)

    def oval(self, colour, x, y, across, high=None):
        high = high or across
        box = (x - across / 2, y - high / 2, x + across / 2, y + high / 2)
        self.draw.ellipse([value * self.scale for value in box], fill=colour)

    def line(self, colour, width, *points):
        self.draw.line([(x * self.scale, y * self.scale) for x, y in points], colour, round(width * self.scale), "curve")


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius * image.width / 100))


def ship() -> Image.Image:
    image = canvas((150, 190, 225), (205, 222, 235))
    pen = Pen(image)
    pen.shape((62, 98, 130), (0, 62), (100, 62), (100, 100), (0, 100))
    for y, shade in ((68, 8), (76, -6), (85, 6), (93, -8)):
        pen.shape((62 + shade, 98 + shade, 130 + shade), (0, y), (40, y - 1), (100, y + 1), (100, y + 4), (0, y + 3))
    pen.shape((236, 236, 232), (26, 53), (30, 40), (72, 40), (78, 53))  # superstructure
    pen.shape((224, 224, 222), (34, 40), (36, 31), (62, 31), (66, 40))
    for x in range(32, 74, 6):
        pen.shape((70, 90, 105), (x, 45), (x + 3, 45), (x + 3, 48), (x, 48))
    pen.shape((190, 60, 45), (42, 31), (43, 20), (51, 20), (52, 31))  # funnel
    pen.shape((40, 40, 44), (43, 23), (43, 19), (51, 19), (51, 23))
    pen.line((90, 90, 95), 0.8, (66, 40), (68, 18))
    pen.shape((44, 52, 66), (6, 52), (95, 52), (88, 68), (16, 68))  # hull
    pen.shape((150, 50, 45), (15, 65), (90, 65), (88, 69), (17, 69))
    pen.shape((225, 235, 240), (10, 69), (94, 69), (97, 71), (6, 71))  # wash
    return blurred(image, 0.25)


def airplane() -> Image.Image:
    image = canvas((70, 125, 195), (170, 205, 235))
    for x, y, across in ((18, 82, 30), (34, 86, 34), (80, 20, 26), (92, 24, 24)):
        Pen(image).oval((215, 228, 240), x, y, across, across / 3)
    image = blurred(image, 2.5)
    pen = Pen(image)
    pen.shape((150, 156, 165), (50, 47), (62, 45), (70, 22), (63, 22))  # far wing
    pen.shape((168, 40, 45), (14, 44), (8, 24), (17, 24), (28, 43))  # fin
    pen.shape((236, 238, 241), (9, 45), (30, 41), (78, 41), (88, 45), (93, 50), (86, 54), (70, 56), (30, 56), (18, 51))
    pen.shape((198, 203, 210), (20, 51), (92, 51), (86, 54), (70, 56), (30, 56))
    pen.shape((185, 190, 198), (6, 42), (20, 44), (16, 49), (3, 45))  # tailplane
    pen.shape((205, 209, 215), (44, 52), (64, 51), (40, 82), (30, 82))  # near wing
    pen.oval((120, 126, 135), 50, 66, 12, 5.5)
    for x in range(30, 80, 4):
        pen.oval((60, 75, 95), x, 47, 1.8, 2.2)
    pen.shape((50, 62, 80), (83, 45.5), (88, 46), (89, 48), (83, 48))
    return blurred(image, 0.25)


def frog() -> Image.Image:
    image = canvas((96, 110, 62), (128, 116, 84))
    for x, y, across, colour in (
        (15, 20, 40, (84, 104, 52)), (80, 25, 50, (110, 122, 70)), (30, 90, 60, (140, 124, 92)), (85, 85, 40, (110, 98, 70)),
    ):  # fmt: skip
        Pen(image).oval(colour, x, y, across, across / 2)
    image = blurred(image, 4)
    pen = Pen(image)
    dark, green, light = (62, 92, 34), (98, 140, 48), (150, 182, 82)
    pen.oval((70, 66, 44), 50, 84, 84, 12)  # shadow
    pen.oval(dark, 22, 68, 34, 32)  # hind legs
    pen.oval(dark, 78, 68, 34, 32)
    pen.shape(green, (6, 82), (26, 74), (34, 84), (10, 88))
    pen.shape(green, (94, 82), (74, 74), (66, 84), (90, 88))
    pen.oval(green, 50, 60, 54, 48)  # body
    pen.oval(light, 50, 70, 36, 28)  # belly
    pen.shape(green, (32, 64), (41, 66), (40, 86), (30, 87))  # fore legs
    pen.shape(green, (68, 64), (59, 66), (60, 86), (70, 87))
    pen.oval(green, 50, 42, 50, 30)  # head
    pen.oval(green, 33, 29, 17)
    pen.oval(green, 67, 29, 17)
    for x in (33, 67):
        pen.oval((222, 190, 70), x, 28, 11)
        pen.oval((20, 20, 16), x, 28, 7, 5)
    pen.line((48, 68, 26), 1.2, (29, 45), (40, 50), (50, 51.5), (60, 50), (71, 45))
    for x, y in ((40, 34), (58, 36), (50, 56), (24, 62), (78, 62)):
        pen.oval(dark, x, y, 4, 3)
    return blurred(image, 0.5)


def car() -> Image.Image:
    image = canvas((176, 190, 200), (198, 200, 198))
    pen = Pen(image)
    pen.shape((116, 132, 104), (0, 42), (20, 36), (52, 40), (80, 35), (100, 41), (100, 60), (0, 60))
    pen.shape((120, 120, 122), (0, 58), (100, 58), (100, 100), (0, 100))
    image = blurred(image, 1.5)
    pen = Pen(image)
    pen.oval((70, 70, 72), 50, 79, 90, 7)
    red, dark = (186, 36, 34), (140, 24, 26)
    pen.shape(red, (24, 50), (36, 33), (64, 33), (78, 49), (78, 54), (22, 54))
    pen.shape((52, 66, 80), (29, 50), (38, 36), (50, 36), (50, 50))
    pen.shape((52, 66, 80), (53, 50), (53, 36), (63, 36), (73, 50))
    pen.shape(red, (6, 58), (10, 52), (28, 49), (76, 49), (92, 54), (95, 62), (94, 73), (6, 73))
    pen.shape(dark, (6, 67), (95, 67), (94, 75), (7, 75))
    for x in (25, 76):
        pen.oval((26, 26, 28), x, 74, 19)
        pen.oval((186, 188, 192), x, 74, 11)
        pen.oval((90, 92, 96), x, 74, 4)
    pen.oval((250, 240, 190), 92, 58, 5, 4)
    pen.oval((230, 90, 50), 8, 59, 4, 4)
    pen.line(dark, 0.6, (51.5, 50), (51.5, 66))
    return blurred(image, 0.25)


def moon() -> Image.Image:
    image = canvas((10, 14, 34), (28, 36, 70))
    pen = Pen(image)
    pen.oval((52, 60, 96), 52, 46, 62)
    image = blurred(image, 5)
    pen = Pen(image)
    for x, y, across in (
        (10, 14, 1.2),
        (24, 70, 0.8),
        (84, 20, 1.4),
        (91, 62, 0.9),
        (12, 44, 0.7),
        (70, 90, 1.1),
        (38, 8, 0.8),
    ):
        pen.oval((235, 235, 220), x, y, across)
    pen.oval((238, 232, 208), 52, 46, 46)
    for x, y, across in ((44, 38, 9), (60, 52, 12), (48, 58, 6), (62, 34, 5), (40, 50, 4), (54, 44, 3)):
        pen.oval((208, 200, 172), x, y, across, across * 0.9)
    return blurred(image, 0.3)


DRAWINGS = {"ship": ship, "airplane": airplane, "frog": frog, "automobile": car, "moon": moon}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        picture = draw().resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        picture.save(FOLDER / f"{name}.jpg", quality=88)

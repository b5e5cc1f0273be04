"""The scene of Shapes3D as rays see it: a room without a roof, one object, one camera per angle.

x points right along the back wall, y from the camera at orientation 0 to that wall, z up; the
object stands on the origin, which the camera circles. The unit of length is the camera's distance
from the vertical through the origin. All rays are traced at once; ``P`` counts pixels, ``R`` rays.

The numbers are fitted to genuine frames of the published animation, those of light and of places
together, so that one of them alone means little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SIDE = 64
SKY, FLOOR, WALL, OBJECT = range(4)
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)

CAMERA_HEIGHT = 0.2870
PITCH_DEGREES = 0.4626  # downwards
FOCAL_PIXELS = 72.61
CENTRE_COLUMN = 32.37  # where the middle of the view is
TURN_PER_DEGREE = 0.9725  # of the label; the frames ask for less than the full +-30 degrees
SCALE_POWER = 1.1755  # lengths go with scale ** SCALE_POWER

BACK, LEFT, RIGHT = 1.3947, 1.3303, 1.3228  # distances of the walls from the origin
WALL_HEIGHT = 0.7533

# Radius (half a side for the cube) and height at scale 1.
DIMENSIONS = {
    CUBE: (0.1466, 2 * 0.1466),
    CYLINDER: (0.1490, 0.2972),
    SPHERE: (0.1676, 2 * 0.1676),
    CAPSULE: (0.1285, 0.5143),
}

# Where the sun stands, not normalised. It shines on the floor and the object, not on the walls.
LIGHT = (-0.2582, 0.1514, 1.0)
AMBIENT, HEADLIGHT, SUN = 0.3088, 0.5957, 0.9050
GAINS = (0.0, 1.0518, 1.1314, 1.0563)  # of sky, floor, wall, object
SIDE_WALL_GAIN = 0.9761  # on top of the wall's
HEADLIGHT_PARALLEL = 0.7395  # share of the headlight that shines along the view, not from the eye
SHINE = 0.1054  # white that the sun adds to the object, of 1
SPOT = (-0.6200, 0.2228)  # the sun is strongest here on the floor
SPOT_FALLOFF = 0.5646  # and falls off with exp(-SPOT_FALLOFF * distance ** 2)

TOO_NEAR = 1e-4  # hits closer than this are the surface that a shadow ray starts from


class Traced(NamedTuple):
    """What each ray hits, how bright that is, and the white added (of 1), each [P, R / P]."""

    region: np.ndarray
    factor: np.ndarray
    white: np.ndarray


def trace(orientation: float, shape: int, scale: float, samples: int) -> Traced:
    """Send samples x samples rays through every pixel, row by row.

    Args:
        orientation: the label's angle in degrees, -30..30.
        shape: one of CUBE, CYLINDER, SPHERE, CAPSULE.
        scale: the label's scale, 0.75..1.25.
        samples: rays per pixel are its square.
    """
    turn = np.radians(orientation * TURN_PER_DEGREE)
    size = tuple(scale**SCALE_POWER * length for length in DIMENSIONS[shape])
    eye, forward, rays = _camera(turn, samples)
    behind, normal, region = _room(eye, rays)
    distance = HITS[shape](eye, rays, *size)
    hit = distance < behind
    region[hit] = OBJECT
    points = eye + np.minimum(distance, behind)[:, None] * rays
    normal[hit] = _object_normals(points[hit], shape, *size)

    light = np.array(LIGHT, np.float32) / np.float32(np.linalg.norm(LIGHT))
    sun = np.where(region == WALL, 0, np.maximum(normal @ light, 0))
    white = np.where(hit & (sun > 0), np.float32(SHINE), np.float32(0))
    floor = np.flatnonzero(region == FLOOR)
    toward = np.broadcast_to(light, (len(floor), 3))
    shadow = HITS[shape](points[floor], toward, *size) < np.inf
    away = ((points[floor, :2] - np.array(SPOT, np.float32)) ** 2).sum(1)
    sun[floor] *= np.where(shadow, 0, np.exp(-SPOT_FALLOFF * away))

    view = HEADLIGHT_PARALLEL * forward + (1 - HEADLIGHT_PARALLEL) * rays
    head = np.maximum(-np.einsum("ij,ij->i", normal, view), 0)
    gain = np.array(GAINS, np.float32)[region]
    gain[(region == WALL) & (normal[:, 0] != 0)] *= SIDE_WALL_GAIN
    factor = gain * (AMBIENT + HEADLIGHT * head + SUN * sun)
    shape_out = (SIDE * SIDE, samples * samples)
    return Traced(region.reshape(shape_out), factor.reshape(shape_out), white.reshape(shape_out))


def _camera(turn: float, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place the camera: the eye [3], the unit direction of view [3] and unit rays [R, 3]."""
    pitch = np.radians(PITCH_DEGREES)
    ahead = np.array([-np.sin(turn), np.cos(turn), 0.0])
    aside = np.array([np.cos(turn), np.sin(turn), 0.0])
    above = np.array([0.0, 0.0, 1.0])
    eye = CAMERA_HEIGHT * above - ahead
    forward = np.cos(pitch) * ahead - np.sin(pitch) * above
    top = np.cos(pitch) * above + np.sin(pitch) * ahead
    pixel, within = np.arange(SIDE), (np.arange(samples) + 0.5) / samples
    row, column, down, right = np.meshgrid(pixel, pixel, within, within, indexing="ij")
    x = (column + right - CENTRE_COLUMN).reshape(-1, 1) / FOCAL_PIXELS
    y = (SIDE / 2 - row - down).reshape(-1, 1) / FOCAL_PIXELS
    rays = forward + x * aside + y * top
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    return eye.astype(np.float32), forward.astype(np.float32), rays.astype(np.float32)


def _room(eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find distance [R], normal [R, 3] and region [R] of floor, wall or sky behind the object."""
    planes = (  # axis, place, normal
        (2, 0.0, 1.0),
        (1, BACK, -1.0),
        (0, -LEFT, 1.0),
        (0, RIGHT, -1.0),
    )
    distances = np.full((len(planes), len(rays)), np.inf, np.float32)
    normals = np.zeros((len(planes), 3), np.float32)
    for i, (axis, place, sign) in enumerate(planes):
        normals[i, axis] = sign
        ahead = sign * rays[:, axis] < 0
        distances[i, ahead] = (place - eye[axis]) / rays[ahead, axis]
    nearest = distances.argmin(0)
    distance = distances[nearest, np.arange(len(rays))]
    over = eye[2] + distance * rays[:, 2] > WALL_HEIGHT
    region = np.where(nearest == 0, FLOOR, np.where(over, SKY, WALL))
    return distance, normals[nearest], region


def _cube(origin: np.ndarray, rays: np.ndarray, radius: float, height: float) -> np.ndarray:
    low = np.array([-radius, -radius, 0], np.float32)
    high = np.array([radius, radius, height], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (low - origin) / rays, (high - origin) / rays
        enter, leave = np.minimum(one, other).max(1), np.maximum(one, other).min(1)
        return np.where((enter < leave) & (leave > TOO_NEAR), enter, np.inf)


def _cylinder(origin: np.ndarray, rays: np.ndarray, radius: float, height: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        lid = (height - origin[..., 2]) / rays[:, 2]
        across = origin[..., :2] + lid[:, None] * rays[:, :2]
        on = ((across**2).sum(1) <= radius * radius) & (lid > TOO_NEAR)
    nearest: np.ndarray = np.minimum(
        _tube(origin, rays, radius, 0.0, height), np.where(on, lid, np.inf)
    )
    return nearest


def _sphere(origin: np.ndarray, rays: np.ndarray, radius: float, height: float) -> np.ndarray:
    return _ball(origin, rays, radius, height / 2)


def _capsule(origin: np.ndarray, rays: np.ndarray, radius: float, height: float) -> np.ndarray:
    low, high = radius, height - radius
    ends = np.minimum(_ball(origin, rays, radius, low), _ball(origin, rays, radius, high))
    nearest: np.ndarray = np.minimum(_tube(origin, rays, radius, low, high), ends)
    return nearest


# Distance [R], inf where missed, of the object from origins [3] or [R, 3] along rays [R, 3].
HITS: dict[int, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    CUBE: _cube,
    CYLINDER: _cylinder,
    SPHERE: _sphere,
    CAPSULE: _capsule,
}


def _ball(origin: np.ndarray, rays: np.ndarray, radius: float, middle: float) -> np.ndarray:
    start = origin - np.array([0, 0, middle], np.float32)
    b = (start * rays).sum(1)
    square = b * b - (start**2).sum(-1) + radius * radius
    distance = -b - np.sqrt(np.maximum(square, 0))
    return np.where((square > 0) & (distance > TOO_NEAR), distance, np.inf)


def _tube(
    origin: np.ndarray, rays: np.ndarray, radius: float, low: float, high: float
) -> np.ndarray:
    start, flat = origin[..., :2], rays[:, :2]
    a, b = (flat**2).sum(1), (start * flat).sum(1)
    square = b * b - a * ((start**2).sum(-1) - radius * radius)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = (-b - np.sqrt(np.maximum(square, 0))) / a
        z = origin[..., 2] + distance * rays[:, 2]
        on = (square > 0) & (distance > TOO_NEAR) & (z >= low) & (z <= high)
    return np.where(on, distance, np.inf)


def _object_normals(points: np.ndarray, shape: int, radius: float, height: float) -> np.ndarray:
    """Compute the normals [n, 3] at points [n, 3] of the object's surface."""
    normals = points / np.float32(radius)
    if shape == CUBE:
        normals[:, 2] -= 1
        axis = np.abs(normals).argmax(1)[:, None]
        return np.where(np.arange(3) == axis, np.sign(normals), 0)
    if shape == CYLINDER:
        lid = points[:, 2] >= height * (1 - 1e-4)
        normals[:, 2] = 0
        normals[lid] = [0, 0, 1]
        return normals
    low, high = radius, height - radius
    normals[:, 2] = (points[:, 2] - np.clip(points[:, 2], low, high)) / radius
    return normals

"""Pictures of synthetic scenes and their exact depth, by ray casting (open3d)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scenes_layout import Light, Scene
from .scenes_textures import Palette, noise_tiles

_RAYS, _SAMPLES = 12, 2
# A ray that starts on a surface must not meet that surface again.
_LIFT = 2e-3
MISSED = 0xFFFFFFFF


class Renderer:
    """Casts rays into one scene."""

    def __init__(self, scene: Scene) -> None:
        import open3d

        self.scene = scene
        library: Any = open3d  # its type hints leave out arrays
        self._tensor = library.core.Tensor
        self._caster = library.t.geometry.RaycastingScene(nthreads=1)
        self._palette = Palette([part.material for part in scene.parts])
        for part in scene.parts:
            vertices, faces = part.vertices.astype(np.float32), part.faces.astype(np.uint32)
            self._caster.add_triangles(self._tensor(vertices), self._tensor(faces))
        self._rotations = np.stack([part.rotation for part in scene.parts]).astype(np.float32)
        self._origins = np.stack([part.origin for part in scene.parts]).astype(np.float32)
        self._extents = np.stack([part.extents for part in scene.parts]).astype(np.float32)

    def intrinsics(self, height: int, width: int) -> np.ndarray:
        """float32 (3, 3); pixel centres are at whole numbers, so the principal point is at (width - 1) / 2."""
        focal = width / (2 * np.tan(self.scene.fov_x / 2))
        return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float32)

    def depth(self, height: int, width: int) -> np.ndarray:
        """float32 (height, width): metres along the axis at each pixel's centre; 0 where nothing was met."""
        met = self._cast(self._rays(height, width, 1))
        depth = met["t_hit"].numpy()
        return np.where(np.isfinite(depth), depth, 0).astype(np.float32)

    def picture(self, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
        """uint8 (height, width, 3), as a camera would take it."""
        rays = self._rays(height, width, _SAMPLES)
        flat = rays.reshape(-1, 6)
        met = self._cast(rays)
        parts = met["geometry_ids"].numpy().reshape(-1)
        far = met["t_hit"].numpy().reshape(-1)
        seen = parts != MISSED
        radiance = np.zeros((len(flat), 3), np.float32)
        if self.scene.sky:
            radiance[~seen] = _sky(flat[~seen, 3:], self.scene, draw)
        normals = met["primitive_normals"].numpy().reshape(-1, 3)
        shade = self._shade(height, width, draw).reshape(-1, 1)
        numbers = parts[seen].astype(np.int64)
        radiance[seen] = self._surface(flat[seen], far[seen], normals[seen], numbers, shade[seen], draw)
        if self.scene.haze:
            kept = np.exp(-self.scene.haze * np.where(seen, far, 0))[:, None]
            radiance = radiance * kept + (1 - kept) * self.scene.ambient
        fine = radiance.reshape(height, _SAMPLES, width, _SAMPLES, 3)
        return _develop(fine.mean(axis=(1, 3)), draw)

    def _cast(self, rays: np.ndarray) -> Any:
        return self._caster.cast_rays(self._tensor(rays.astype(np.float32)), nthreads=1)

    def _rays(self, height: int, width: int, samples: int) -> np.ndarray:
        """(height x samples, width x samples, 6): origin and a direction that is 1 long along the axis."""
        focal = width / (2 * np.tan(self.scene.fov_x / 2))
        u, v = (((np.arange(n * samples) + 0.5) / samples - n / 2) / focal for n in (width, height))
        right, down, forward = self.scene.look
        direction = forward + u[None, :, None] * right + v[:, None, None] * down
        origin = np.broadcast_to(self.scene.eye, direction.shape)
        rays: np.ndarray = np.concatenate([origin, direction], axis=-1).astype(np.float32)
        return rays

    def _surface(
        self,
        rays: np.ndarray,
        far: np.ndarray,
        normals: np.ndarray,
        parts: np.ndarray,
        shade: np.ndarray,
        draw: np.random.Generator,
    ) -> np.ndarray:
        """Light that points send to the camera, linear RGB (n, 3)."""
        toward = -rays[:, 3:] / np.linalg.norm(rays[:, 3:], axis=1, keepdims=True)
        normals = np.where((normals * toward).sum(1, keepdims=True) < 0, -normals, normals)
        points = rays[:, :3] + rays[:, 3:] * far[:, None]
        turned = self._rotations[parts]
        local = np.einsum("nji,nj->ni", turned, points - self._origins[parts])
        facing = np.einsum("nji,nj->ni", turned, normals)
        colours = self._palette.colours(parts, local, facing, self._extents[parts])
        gloss, glow = (
            np.array([getattr(m, name) for m in self._palette.materials], np.float32)[parts, None]
            for name in ("gloss", "glow")
        )
        lifted = points + normals * _LIFT * np.maximum(1, far[:, None] / 10)
        up = 0.75 + 0.25 * normals[:, 2:]
        result = colours * self.scene.ambient.astype(np.float32) * shade * up
        for light in self.scene.lights:
            arriving, direction = self._light(light, lifted, normals, draw)
            halfway = direction + toward
            halfway /= np.maximum(np.linalg.norm(halfway, axis=1, keepdims=True), 1e-6)
            shine = gloss * np.maximum((halfway * normals).sum(1, keepdims=True), 0) ** 40
            result += arriving * (colours + shine)
        return result + glow * colours

    def _light(
        self, light: Light, points: np.ndarray, normals: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """What of a light reaches each point (n, 3), and from where (n, 3)."""
        spread = light.size * draw.standard_normal(points.shape, dtype=np.float32)
        place = light.place.astype(np.float32)
        toward = place + spread if light.sun else place + spread - points
        distance = np.linalg.norm(toward, axis=1, keepdims=True)
        direction = toward / np.maximum(distance, 1e-6)
        slant = np.maximum((direction * normals).sum(1, keepdims=True), 0)
        reach = np.inf if light.sun else 1.0
        rays = np.concatenate([points, direction if light.sun else toward * 0.98], axis=1)
        dark = self._blocked(rays, reach)
        fading = 1.0 if light.sun else 1 / (0.3 + distance**2)
        return light.colour.astype(np.float32) * slant * fading * ~dark[:, None], direction

    def _shade(self, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
        """Share of the surroundings that each fine pixel sees.

        Found once for each pixel and smoothed over a few, as the few rays that fit the time leave it noisy.
        """
        from scipy.ndimage import gaussian_filter

        rays = self._rays(height, width, 1).reshape(-1, 6)
        met = self._cast(rays)
        far = met["t_hit"].numpy()
        seen = np.isfinite(far)
        toward, points = -rays[seen, 3:], rays[seen, :3] + rays[seen, 3:] * far[seen, None]
        normals = met["primitive_normals"].numpy()[seen]
        normals = np.where((normals * toward).sum(1, keepdims=True) < 0, -normals, normals)
        points = points + normals * _LIFT * np.maximum(1, far[seen, None] / 10)
        free = np.zeros(len(points), np.float32)
        for _ in range(_RAYS):
            away = draw.standard_normal(points.shape, dtype=np.float32)
            away /= np.linalg.norm(away, axis=1, keepdims=True)
            away = normals + 0.98 * away  # spread like the cosine
            free += ~self._blocked(np.concatenate([points, away * self.scene.shade_reach], axis=1), 1.0)
        share = np.ones(height * width, np.float32)
        share[seen] = free / _RAYS
        smooth = gaussian_filter(share.reshape(height, width), height / 110)
        return 0.15 + 0.85 * smooth.repeat(_SAMPLES, 0).repeat(_SAMPLES, 1)

    def _blocked(self, rays: np.ndarray, reach: float) -> np.ndarray:
        tensor = self._tensor(rays.astype(np.float32))
        found: np.ndarray = self._caster.test_occlusions(tensor, tnear=0.0, tfar=reach, nthreads=1).numpy()
        return found


def _sky(directions: np.ndarray, scene: Scene, draw: np.random.Generator) -> np.ndarray:
    """Blue upwards, pale at the horizon, with clouds."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    height = np.clip(unit[:, 2:], 0, 1)
    blue, pale = np.array([0.25, 0.45, 0.9]), np.array([0.9, 0.95, 1.0])
    colour = pale + (blue - pale) * height**0.5
    tile = noise_tiles()[draw.integers(4, 8)]
    place = (unit[:, :2] / (0.25 + height)) * 40 + draw.uniform(0, 256, 2)
    row, column = (place.astype(int) % 256).T
    cover = np.clip(3 * (tile[row, column] - draw.uniform(0.35, 0.8)), 0, 1)[:, None]
    sky: np.ndarray = (colour + cover * (1 - colour)) * float(scene.ambient.mean()) * 1.3
    return sky


def _develop(radiance: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A camera's work: exposure, white balance, vignetting, blur, tone curve, noise; uint8."""
    from scipy.ndimage import gaussian_filter

    height, width, _ = radiance.shape
    exposed = radiance * (draw.uniform(0.12, 0.3) / max(float(np.median(radiance)), 1e-4))
    exposed = exposed * (1 + draw.uniform(-0.08, 0.08, 3))
    row, column = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    exposed = exposed * (1 - draw.uniform(0, 0.2) * (row**2 + column**2))[:, :, None]
    if draw.random() < 0.4:
        exposed = gaussian_filter(exposed, (*[draw.uniform(0.2, 0.7)] * 2, 0))
    curve = np.where(exposed < 0.6, exposed, 0.6 + 0.4 * (1 - np.exp(-(exposed - 0.6) / 0.4)))
    values = np.clip(curve, 0, 1) ** (1 / 2.2)
    values = values + draw.normal(0, draw.uniform(0, 0.025), values.shape)
    developed: np.ndarray = (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
    return developed

"""The adaptive form on digits: its images are those on which teacher and student disagree."""

from dataclasses import replace

import pytest
import torch

from kdkernels.cli.demo import IMAGE_SHAPE, NUM_CLASSES, DemoSettings, synthesize, train_student, train_teacher
from kdkernels.data import load_digits
from kdkernels.distillation.synthesis import balanced_labels, batch_generator
from kdkernels.functional import js_div_with_logits
from kdkernels.inversion import DeepInversion


@pytest.mark.slow
def test_adaptive_form_raises_the_divergence():
    """JS(teacher, student) at temperature 3 of new images, with and without competition; mean of three seeds."""
    settings = DemoSettings()
    gains = []
    for seed in range(3):
        teacher = train_teacher(settings, *load_digits().train, seed)
        images, _, _ = synthesize(settings, teacher, settings.inversion, seed)
        student = train_student(settings, teacher, images, seed)[0].eval()
        divergences = []
        for weight in (0.0, 10.0):
            config = replace(settings.inversion, compete_weight=weight)
            generator = batch_generator(seed, settings.batches)  # a batch that the student has not seen
            labels = balanced_labels(settings.batches, config.batch_size, NUM_CLASSES, generator)
            inverter = DeepInversion(teacher, IMAGE_SHAPE, config, student=student)
            images = inverter.synthesize(labels, generator=generator).images
            with torch.no_grad():
                divergences.append(js_div_with_logits(student(images), teacher(images), temperature=3.0).item())
        gains.append(divergences[1] - divergences[0])
        print(f"seed {seed}: JS {divergences[0]:.4f} without competition, {divergences[1]:.4f} with it")
    assert sum(gains) > 0

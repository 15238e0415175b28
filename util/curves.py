"""Curves and images of a run, in TensorBoard and, with --wandb, in Weights & Biases."""
import io
import math
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from util.errors import UserError, printable
from util.files import replace_file, writing


class Curves:
    """Writes TensorBoard events to a run's folder; wandb_id: the W&B run to continue, or None."""

    def __init__(self, folder, opt, config, wandb_id):
        from tensorboard_logger import tensorboard_logger  # here, since its import takes a second
        self.folder, self.summaries = folder, tensorboard_logger.summary_pb2
        self.wandb = start_wandb(opt, config, wandb_id) if opt.wandb else None
        with writing(folder):
            for _ in range(20):                                         # files are named by the second
                if any(folder.glob(f'events.out.tfevents.{int(time.time())}.*')):
                    time.sleep(0.1)
            self.events = tensorboard_logger.Logger(str(folder), flush_secs=2)

    def log_values(self, values, step):
        """Send a dict of numbers."""
        with writing(self.folder):
            for tag, value in values.items():
                self.events.log_value(tag, value, step)
        if self.wandb:
            self.wandb.log({'epoch': step, **values})

    def log_image(self, tag, array, step):
        """Send a uint8 array [h, w, 3], and write it to <tag>.png."""
        # The package's own log_images needs functions that SciPy no longer has.
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format='png')
        summary = self.summaries.Summary()
        image = summary.Image(encoded_image_string=buffer.getvalue(), height=array.shape[0], width=array.shape[1])
        summary.value.add(tag=tag, image=image)
        with writing(self.folder):
            replace_file(self.folder / f'{tag}.png', buffer.getvalue())
            self.events._log_summary(tag, summary, None, step)
        if self.wandb:
            import wandb
            self.wandb.log({'epoch': step, tag: wandb.Image(array)})


def start_wandb(opt, config, wandb_id):
    import wandb
    try:
        run = wandb.init(entity=opt.wandb_entity, project=opt.wandb_project, id=wandb_id, config=config,
                         name=f'{opt.output_name}, trial {opt.trial}', resume='allow' if wandb_id else None)
    except (wandb.Error, TypeError, ValueError) as error:
        raise UserError(f'--wandb: {error}') from error
    run.define_metric('*', step_metric='epoch')     # W&B's own step drops what is logged after a step has been sent
    return run


def confusion_image(matrix, classes):
    """A confusion matrix [C, C] as uint8 [h, w, 3]: rows are classes, columns predictions, blue the part of a row."""
    side = max(4, min(40, 800 // len(classes)))                         # of a cell, in pixels
    font = ImageFont.load_default(size=min(14, max(8, side - 2)))
    names = [printable(name)[:24] for name in classes] if side >= 10 else []
    margin = 10 + max([math.ceil(font.getlength(name)) for name in names], default=0)
    fractions = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    color = 255 - fractions[..., None] * torch.tensor([247., 174., 77.])                 # white to dark blue
    cells = color.round().byte().repeat_interleave(side, 0).repeat_interleave(side, 1).numpy()
    image = Image.new('RGB', (margin + cells.shape[1] + 5, margin + cells.shape[0] + 5), 'white')
    image.paste(Image.fromarray(cells), (margin, margin))
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        middle = margin + i * side + side // 2
        pen.text((margin - 5, middle), name, 'black', font, anchor='rm')
        column = Image.new('RGB', (margin - 5, side), 'white')
        ImageDraw.Draw(column).text((0, side // 2), name, 'black', font, anchor='lm')
        image.paste(column.rotate(90, expand=True), (margin + i * side, 0))
        for j, count in enumerate(matrix[i].tolist() if side >= 20 else ()):
            if count:
                shade = 'white' if fractions[i, j] > 0.5 else 'black'
                pen.text((margin + j * side + side // 2, middle), str(count), shade, font, anchor='mm')
    return np.array(image)


def grid_of_views(images, n_images, opt, count=16):
    """The first `count` images of a batch [n_views * n_images, 3, size, size], a row for each view: uint8 [h, w, 3]."""
    images = images.view(-1, n_images, *images.shape[1:])[:, :count].flatten(0, 1).float().cpu()
    images = images * torch.tensor(opt.std)[:, None, None] + torch.tensor(opt.mean)[:, None, None]
    images = images.repeat_interleave(max(1, 64 // opt.size), 2).repeat_interleave(max(1, 64 // opt.size), 3)
    grid = make_grid(images.clamp(0, 1), nrow=min(count, n_images))
    return (grid * 255).round().byte().permute(1, 2, 0).numpy()

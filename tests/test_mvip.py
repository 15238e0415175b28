"""MVIP, augmentation folders and hard negatives: what is read, which label it has, what is made of it."""
import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_ce
import main_linear
import main_supcon
from datasets import load_images, make_loader, pretraining_view
from datasets.augmentations import augmentation_folder
from datasets.mvip import ObjectImage
from util import arguments, metrics
from util.errors import UserError

GEARS = {'Gear': (250, 0, 0), 'Gear Box': (0, 250, 0), 'Axle-2': (0, 0, 250)}      # class: color of its object
ORDER = ['Axle-2', 'Gear', 'Gear Box']                                             # by name
AUGS = ['--aug_output_name', 'augs', '--aug_name_id', 'augs-id', '--aug_name_ood', 'augs-ood']


def save_scene(folder, name, color, box, size=(64, 48)):
    """A gray image with an object of one color at `box`, and its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = Image.new('RGB', size, (90, 90, 90)), Image.new('L', size)
    image.paste(color, box)
    mask.paste(255, box)
    image.save(folder / f'{name}rgb.png')
    mask.save(folder / f'{name}rgb_mask_gen.png')


@pytest.fixture
def tree(tmp_path):
    """An MVIP tree of three classes, several sets, orientations and cameras, and a class of another super-class.

    Masks are so named that listing images and listing masks gives different orders.
    """
    root = tmp_path / 'data' / 'MVIP' / 'sets'
    for label, color in GEARS.items():
        x = 0
        for part, orientations in (('train_data', ('up', 'down')), ('valid_data', ('',)), ('test_data', ('',))):
            for group in ('0', '1'):
                for orientation in orientations:
                    for camera in ('c0', 'c1'):
                        for name in ('1_', '10_', '1'):
                            x = (x + 7) % 40
                            save_scene(root / label / part / group / orientation / camera, name, color,
                                       (x, 5 + x // 2, x + 8, 5 + x // 2 + 12))
        (root / label / 'meta.json').write_text(json.dumps({'super_class': ['Other', 'CarComponent']}))
    save_scene(root / 'Bolt' / 'train_data' / '0' / 'up' / 'c', '', (9, 9, 9), (1, 1, 5, 5))
    (root / 'Bolt' / 'meta.json').write_text('{"super_class": "Fastener", "description": ""}')
    return root


@pytest.fixture
def augs(tmp_path):
    """Augmentation folders: id images in the color of their class, ood images in its complement."""
    root = tmp_path / 'da_fusion' / 'output' / 'augs'
    for kind in ('id', 'ood'):
        (root / f'augs-{kind}').mkdir(parents=True)
        for label, color in GEARS.items():
            color = color if kind == 'id' else tuple(250 - c for c in color)
            for index in range(3):
                for number in range(2):
                    file = f"{label.replace(' ', '_')}-{index}-{number}.png"
                    Image.new('RGB', (40, 40), color).save(root / f'augs-{kind}' / file)
    return root


def mvip_options(tmp_path, **changes):
    return arguments.defaults(**{'dataset': 'mvip', 'data_folder': str(tmp_path / 'data/MVIP/sets'), 'device': 'cpu',
                            'aug_root': str(tmp_path / 'da_fusion/output'), 'mvip_super_class': 'CarComponent',
                            'mvip_num_classes': 20, 'num_workers': 0, 'size': 16, 'batch_size': 8, **changes})


def color_class(pixels):
    """The class whose color an image [..., 3] shows most."""
    return ORDER.index(list(GEARS)[np.asarray(pixels).reshape(-1, 3).mean(0).argmax()])


@pytest.mark.parametrize('loader', ['batched', 'per_sample'])
def test_every_image_is_cropped_around_its_own_object(tree, tmp_path, loader):
    data = load_images(opt := mvip_options(tmp_path, loader=loader, mean=(0., 0., 0.), std=(1., 1., 1.)))
    assert data.train.classes == ORDER
    assert (len(data.train), len(data.val)) == (3 * 24, 3 * 12)
    for part in (data.train, data.val):
        for i in range(len(part)):
            array = np.asarray(part.load(i)).astype(int)
            # The crop is the mask's box, 8x12, grown by 16 in the image, then square; all of the object lies in it.
            colored = np.ptp(array, axis=2) > 100
            assert colored.sum() == 8 * 12
            assert array.shape[0] == array.shape[1]
            assert color_class(array[colored]) == part.labels[i]
    view = pretraining_view(opt).__class__(16, opt.mean, opt.std)
    for images, labels in make_loader(data.train, view, opt):
        for image, label in zip(images, labels):
            assert color_class(image.permute(1, 2, 0)) == label


def test_object_crop_is_exact(tmp_path):
    def crop(box, size=(64, 48)):
        save_scene(tmp_path, '', (250, 0, 0), box, size)
        image = ObjectImage(tmp_path / 'rgb.png', tmp_path / 'rgb_mask_gen.png')
        assert image.read().size == image.size()
        return image.box(), np.asarray(image.read())
    assert crop((30, 20, 32, 22))[0] == (14, 4, 48, 38)                         # 2 + 2 * 16 on a side
    assert crop((20, 20, 40, 24))[0] == (4, -4, 56, 48)                         # 52 x 36, square around its own center
    box, pixels = crop((0, 0, 4, 4))                                            # kept in the image before squaring
    assert box == (0, 0, 20, 20) and (pixels[:4, :4] == [250, 0, 0]).all() and (pixels[4:] == 90).all()
    box, pixels = crop((0, 10, 64, 12), (64, 24))
    assert box == (0, -20, 64, 44)                                              # 64 x 24 leaves the image ...
    assert (pixels[:20] == 0).all() and (pixels[44:] == 0).all() and (pixels[20:44] > 0).any(2).all()   # ... in black


def test_super_class_and_number_of_classes(tree, tmp_path):
    assert load_images(mvip_options(tmp_path, mvip_num_classes=2)).train.classes == ['Axle-2', 'Gear']
    with pytest.raises(UserError, match='--mvip_super_class Plane: no class'):
        load_images(mvip_options(tmp_path, mvip_super_class='Plane'))


def test_files_are_opened_once(tree, tmp_path):
    data = load_images(opt := mvip_options(tmp_path, loader='batched'))
    loader = make_loader(data.train, pretraining_view(opt), opt, 2)
    for file in tree.rglob('*.png'):
        file.unlink()
    loader.set_epoch(2)
    assert sum(len(labels) for _, labels in loader) == 72


def test_validation_images_without_any_masks_are_used_whole(tree, tmp_path):
    for file in tree.glob('*/valid_data/*/*/*_mask_gen.png'):
        file.unlink()
    assert load_images(mvip_options(tmp_path)).val.load(0).size == (64, 48)


@pytest.mark.parametrize('damage, words', [
    (lambda f: f.with_name('1_rgb_mask_gen.png').unlink(), ['1_rgb_mask_gen.png', 'no such file']),
    (lambda f: Image.new('L', (64, 48)).save(f.with_name('1_rgb_mask_gen.png')), ['1_rgb_mask_gen.png', 'empty']),
    (lambda f: Image.new('L', (9, 9), 255).save(f.with_name('1_rgb_mask_gen.png')), ['1_rgb_mask_gen', '9x9', '64x48']),
    (lambda f: f.with_name('1_rgb_mask_gen.png').write_bytes(b'x'), ['1_rgb_mask_gen.png', 'not a readable image']),
    (lambda f: f.with_name('1_rgb.png').write_bytes(b'\x89PNG'), ['1_rgb.png', 'not a readable image']),
    (lambda f: (f.parents[4] / 'meta.json').unlink(), ['Gear/meta.json', 'no such file']),
    (lambda f: (f.parents[4] / 'meta.json').write_text('{"super'), ['Gear/meta.json', 'JSONDecodeError']),
    (lambda f: (f.parents[4] / 'meta.json').write_text('{"a": 1}'), ['Gear/meta.json', 'super_class']),
    (lambda f: (f.parents[4] / 'meta.json').write_text('[]'), ['Gear/meta.json', 'super_class']),
    (lambda f: (f.parents[4] / 'meta.json').write_text('{"super_class": 3}'), ['Gear/meta.json', 'super_class']),
])
@pytest.mark.parametrize('loader', ['batched', 'per_sample'])
def test_corrupted_trees_are_rejected(rejected, tree, damage, words, loader):
    damage(tree / 'Gear' / 'train_data' / '0' / 'up' / 'c0' / '1_rgb.png')
    small = ['--dataset', 'mvip', '--model', 'resnet18', '--size', '16']
    rejected(main_supcon.main, *small, '--loader', loader, words=words)


def test_other_wrong_trees_are_rejected(rejected, tree, tmp_path):
    small = ['--dataset', 'mvip', '--model', 'resnet18', '--size', '16']
    rejected(main_ce.main, *small, '--mvip_super_class', 'Plane', words=['Plane', 'no class'])
    rejected(main_ce.main, *small, '--data_folder', 'nowhere', words=['nowhere', 'sets/'])
    for file in (tree / 'Gear' / 'train_data').rglob('*rgb.png'):
        file.unlink()
    rejected(main_ce.main, *small, words=['Gear/train_data', 'no images'])


@pytest.mark.parametrize('dataset', ['digits', 'path', 'mvip'])
def test_augmentations_have_the_label_of_their_own_class(tree, augs, image_folder, tmp_path, dataset):
    """Gear's files are not Gear Box's, whatever the order of files; checked by color, for arrays and files alike."""
    root = image_folder('images', {name: 3 for name in ORDER}) if dataset == 'path' else tree
    opt = mvip_options(tmp_path, dataset=dataset, data_folder=str(root), aug_mode='with_both', aug_output_name='augs',
                       aug_name_id='augs-id', aug_name_ood='augs-ood', loader='batched', mean=(0.,) * 3, std=(1.,) * 3)
    if dataset == 'digits':
        for file in augs.glob('*/*.png'):                   # the digits 0, 1 and 2 stand for the classes here
            name, *fields = file.stem.rsplit('-', 2)
            file.rename(file.with_name(f"{ORDER.index(name.replace('_', ' '))}-{fields[0]}-{fields[1]}.png"))
    data = load_images(opt)
    assert len(data.id) == len(data.ood) == 18
    assert sorted(data.id.labels.tolist()) == sorted([0, 1, 2] * 6)
    assert sorted(data.ood.labels.tolist()) == sorted([-1, -2, -3] * 6)
    joined = data.train.join(data.ood)
    before = len(data.train) - 18
    assert torch.equal(joined.labels[before:], torch.cat([data.id.labels, data.ood.labels]))
    for i in range(before, len(joined)):
        pixels, label = np.asarray(joined.load(i)), int(joined.labels[i])
        assert color_class(pixels if label >= 0 else 250 - pixels.astype(int)) == (label if label >= 0 else -label - 1)
    for images, labels in make_loader(joined, pretraining_view(opt), opt):
        assert images.isfinite().all() and len(images) == len(labels)


@pytest.mark.parametrize('mode, in_train, evaluated', [
    ('none', set(), {'id', 'ood'}), ('with_id', {'id'}, {'id', 'ood'}), ('with_both', {'id'}, {'id', 'ood'}),
    ('id_only', set(), {'id'}), ('ood_only', set(), {'ood'})])
def test_modes(augs, tree, tmp_path, mode, in_train, evaluated):
    data = load_images(mvip_options(tmp_path, aug_mode=mode, aug_output_name='augs', aug_name_id='augs-id',
                                      aug_name_ood='augs-ood'))
    assert len(data.train) == 72 + 18 * len(in_train)
    assert (data.train.labels >= 0).all()                               # ood images never train a classifier
    assert {name for name in ('id', 'ood') if getattr(data, name)} == evaluated


def test_number_of_source_images(augs):
    part = augmentation_folder(augs / 'augs-id', ORDER, 2, '--aug_name_id')
    assert len(part) == 3 * 2 * 2 and not any(re.search(r'-2-\d\.png$', file) for file in part.source)
    assert len(augmentation_folder(augs / 'augs-id', ORDER, -1, '')) == 18
    assert len(augmentation_folder(augs / 'augs-id', ORDER, 0, '')) == 0


def test_spaces_of_a_class_may_be_underscores_or_spaces(tmp_path):
    for name in ('Oil Pump-2-0.png', 'Oil_Pump-2-1.png', 'Oil-0-0.png'):
        (tmp_path / name).touch()
    part = augmentation_folder(tmp_path, ['Oil', 'Oil Pump'], -1, '--aug_name_id')
    assert part.labels.tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="'Oil Pump' and 'Oil_Pump' have the same files"):
        augmentation_folder(tmp_path, ['Oil Pump', 'Oil_Pump'], -1, '--aug_name_id')


def test_wrong_augmentation_folders_are_rejected(rejected, tree, augs, tmp_path):
    def run(*arguments, words):
        rejected(main_supcon.main, '--dataset', 'mvip', '--model', 'resnet18', '--size', '16', *arguments, words=words)
    both = ['--aug_mode', 'with_both', *AUGS]
    run('--aug_mode', 'with_id', words=['--aug_mode with_id', '--aug_output_name', 'missing'])
    run('--aug_mode', 'with_id', '--aug_output_name', 'augs', words=['--aug_mode with_id', '--aug_name_id', 'missing'])
    run('--aug_mode', 'with_both', *AUGS[:4], words=['--aug_mode with_both', '--aug_name_ood', 'missing'])
    run('--aug_name_id', 'augs-id', words=['--aug_name_id', '--aug_output_name'])
    run(*both[:-1], 'nowhere', words=['--aug_name_ood', 'nowhere', 'no such folder'])
    run(*both[:-1], '../augs/augs-id', words=['--aug_name_ood', 'the same folder as --aug_name_id'])
    (augs / 'empty').mkdir()
    run(*both[:-1], 'empty', words=['--aug_name_ood', 'empty', 'no images'])
    stray = augs / 'augs-ood' / 'Gear_Wheel-0-0.png'
    Image.new('RGB', (4, 4)).save(stray)
    run(*both, words=['Gear_Wheel-0-0.png', "no class is called 'Gear_Wheel'"])
    stray.rename(augs / 'augs-ood' / 'Gear-x-0.png')
    run(*both, words=['Gear-x-0.png', '<class>-<index>-<number>.png'])
    (augs / 'augs-ood' / 'Gear-x-0.png').rename(augs / 'augs-ood' / 'Gear-9-0.png')
    (augs / 'augs-ood' / 'Gear-9-0.png').write_bytes(b'no image')
    run(*both, words=['Gear-9-0.png', 'not a readable image'])


def test_the_three_published_commands(call, tree, augs, tmp_path):
    """As they stand, with one epoch, few samples and a thin network added."""
    augs.rename(augs.with_name('mvip-test-dafusion'))
    small = '--epochs=1 --max_samples=24 --width=0.0625 --image_size=32'
    ce = ('--dataset=mvip --output_name=mvip-test-supcon-ce --aug_mode=with_id --aug_output_name=mvip-test-dafusion '
          '--aug_name_id=augs-id --model=resnet-50 --method=SupCon --image_size=224 --epochs=110 --batch_size=16 '
          '--num_workers=4 --lr=0.001 --lr_cosine')
    pre = ('--dataset=mvip --output_name=mvip-test-supcon-pre --aug_mode=with_both '
           '--aug_output_name=mvip-test-dafusion --aug_name_id=augs-id --aug_name_ood=augs-ood '
           '--model=resnet-50 --method=SupCon --image_size=224 '
           '--epochs=110 --batch_size=16 --num_workers=4 --lr=0.001 --lr_cosine')
    linear = ('--dataset=mvip --output_name=mvip-test-supcon-lin --aug_mode=with_id '
              '--aug_output_name=mvip-test-dafusion --aug_name_id=augs-id --model=resnet-50 '
              '--ckpt=output/mvip-test-supcon-pre/trial=0/last.ckpt '
              '--image_size=224 --epochs=50 --batch_size=16 --num_workers=4 --lr=0.001 --lr_cosine')
    for program, command in ((main_ce, ce), (main_supcon, pre), (main_linear, linear)):
        status, out, err = call(program.main, *command.split(), *small.split())
        assert status == 0, err
        assert 'MVIP: 3 classes of CarComponent, 72 training and 36 validation images' in out
    # The linear evaluation takes with_both too, and other methods take the same folders.
    status, out, err = call(main_linear.main, *linear.split(), *small.split(), '--aug_mode=with_both',
                            '--aug_name_ood=augs-ood', '--trial=1')
    assert status == 0, err
    for extra in (['--method=SimCLR'], ['--ce_weight=1']):
        status, out, err = call(main_supcon.main, *pre.split(), *small.split(), '--overwrite', *extra)
        assert status == 0, err


def test_defaults_of_mvip():
    ours = [arguments.parse(program, '', ['--dataset', 'mvip', *extra]) for program, extra in (
        ('main_supcon', []), ('main_ce', []), ('main_linear', ['--ckpt', 'x']))]
    assert [opt.epochs for opt in ours] == [110, 100, 50]
    assert [opt.weight_decay for opt in ours] == [1e-4, 0, 0]
    assert {(opt.learning_rate, opt.batch_size, opt.save_freq, opt.data_folder) for opt in ours} == {
        (0.001, 16, 10, './data/MVIP/sets')}
    assert arguments.parse('main_ce', '', ['--dataset', 'mvip', '--epochs', '3']).epochs == 3


@pytest.mark.parametrize('program', [main_linear, main_ce])
def test_evaluation_of_ood_images(call, tmp_path, monkeypatch, program):
    """Confidences, AUROC and FPR95 in the last lines and in TensorBoard, in every mode."""
    make_augs(monkeypatch, tmp_path, '--dataset', 'digits', '--patches', '2', '--per_class', '2', '--variants', '1')
    status, _, err = call(main_supcon.main, *TINY, *AUGS, '--aug_mode', 'with_both', '--epochs', 1,
                          '--output_name', 'a')
    assert status == 0, err
    arguments = TINY if program is main_ce else [*TINY[:2], *TINY[6:], '--ckpt', 'output/a/trial=0/last.ckpt']
    for mode in ('none', 'with_id', 'with_both', 'ood_only'):
        status, out, err = call(program.main, *arguments, *AUGS, '--aug_mode', mode, '--epochs', 1,
                                '--output_name', mode)
        assert status == 0, err
        number = r'(-?\d+\.\d+)'
        report = re.fullmatch(f'confidence id {number} ood {number} difference {number} AUROC {number} FPR95 {number}',
                              out.splitlines()[-2])
        assert report and out.splitlines()[-1].startswith('best accuracy: ')
        events = EventAccumulator(str(tmp_path / f'output/{mode}/trial=0'))
        events.Reload()
        for value, tag in zip(report.groups(), ('confidence_id', 'confidence_ood', 'confidence_difference', 'auroc',
                                                'fpr95')):
            assert events.Scalars(tag)[-1].value == pytest.approx(float(value), abs=0.006)
    status, out, err = call(program.main, *arguments, *AUGS, '--aug_mode', 'id_only', '--epochs', 1,
                            '--output_name', 'id_only')
    assert status == 0 and re.fullmatch(r'confidence id \d\.\d+', out.splitlines()[-2]), err


def test_confidences_near_one_are_told_apart():
    """In float32 a softmax of such logits is 1."""
    values = metrics.ood_metrics(*torch.tensor([[[20., 0.], [30., 0.]]] * 2 + [[[19., 0.], [25., 0.]]]))
    assert values['auroc'] == 75 and values['confidence_id'] <= 1


def test_ood_metrics_match_a_plain_loop():
    val, ood = 3 * torch.randn(50, 4), 2 * torch.randn(40, 4)
    val[:5] = ood[:5]                                                   # ties
    values = metrics.ood_metrics(val, val[:20], ood)
    inside, outside = ([max(torch.softmax(row.double(), 0)).item() for row in logits] for logits in (val, ood))
    wins = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert values['auroc'] == pytest.approx(100 * sum(wins) / len(wins))
    threshold = sorted(inside, reverse=True)[int(np.ceil(0.95 * len(inside))) - 1]
    assert values['fpr95'] == pytest.approx(100 * sum(b >= threshold for b in outside) / len(outside))
    assert values['confidence_id'] == pytest.approx(np.mean(inside[:20]), abs=1e-6)
    assert values['confidence_ood'] == pytest.approx(np.mean(outside), abs=1e-6)
    assert values['confidence_difference'] == pytest.approx(np.mean(inside[:20]) - np.mean(outside), abs=1e-6)


def make_augs(monkeypatch, tmp_path, *arguments):
    import sys

    from scripts import make_augs as script
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['make_augs.py', '--aug_output_name', 'augs', *arguments])
    script.main()


def test_make_augs(monkeypatch, image_folder, tmp_path):
    """id images keep the look of their class; ood images have the same pixels in other places."""
    root = image_folder(classes={'red one': 12, 'green-2': 12}, size=(16, 16))
    for file in root.glob('*/*.png'):                                   # a gradient, so that places can be reported
        array = np.asarray(Image.open(file)).copy()
        array[..., 2] = np.arange(256).reshape(16, 16)
        Image.fromarray(array).save(file)
    make_augs(monkeypatch, tmp_path, '--dataset', 'path', '--data_folder', str(root), '--per_class', '3',
              '--variants', '2')
    data = load_images(arguments.defaults(dataset='path', data_folder=str(root), aug_output_name='augs',
                                       aug_name_id='augs-id', aug_name_ood='augs-ood', aug_mode='with_id'))
    assert len(data.id) == len(data.ood) == 2 * 3 * 2
    assert {file.name for file in (tmp_path / 'da_fusion/output/augs/augs-id').iterdir()} == {
        f'{name}-{i}-{j}.png' for name in ('red_one', 'green-2') for i in range(3) for j in range(2)}
    sources = {np.sort(np.asarray(data.train.load(i)).reshape(-1, 3), axis=0).tobytes() for i in range(len(data.train))}
    for i in range(len(data.ood)):
        ood = np.asarray(data.ood.load(i))
        assert np.sort(ood.reshape(-1, 3), axis=0).tobytes() in sources          # training images, not validation
        assert not (ood[..., 2] == np.arange(256).reshape(16, 16)).all()
        assert (ood[:4, :4, 2] - ood[0, 0, 2] == np.arange(256).reshape(16, 16)[:4, :4]).all()      # patches are whole
    for i in range(len(data.id)):
        difference = np.asarray(data.id.load(i)).mean((0, 1)) - np.asarray(data.train.load(0)).mean((0, 1))
        assert abs(difference[2]) < 45 and data.id.labels[i] >= 0
    with pytest.raises(UserError, match='holds files already'):
        make_augs(monkeypatch, tmp_path, '--dataset', 'path', '--data_folder', str(root))


def test_synthetic_images_are_made_of_those_that_seed_selects(monkeypatch, tmp_path):
    source_of = {}                                                      # number of a file by its pixels, in any order
    for split in ('train', 'test'):
        (tmp_path / 'images' / split / 'a').mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng([split == 'test', i]).integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / split / 'a' / f'{i:02}.png')
            source_of[np.sort(pixels.reshape(-1, 3), axis=0).tobytes()] = split, i

    def sources(name, *options):
        make_augs(monkeypatch, tmp_path, '--dataset', 'path', '--data_folder', 'images', '--per_class', '4',
                  '--variants', '1', '--aug_output_name', name, *options)
        return [source_of[np.sort(np.asarray(Image.open(file)).reshape(-1, 3), axis=0).tobytes()]
                for file in sorted((tmp_path / 'da_fusion/output' / name / 'augs-ood').iterdir())]
    first = sources('1', '--seed', '0')
    assert len(set(first)) == 4 and {split for split, _ in first} == {'train'}
    assert sources('2', '--seed', '0') == first != sources('3', '--seed', '1')
    assert {split for split, _ in sources('4', '--split', 'val')} == {'test'}


def test_synthetic_id_images_blend_two_images(monkeypatch, tmp_path):
    from scripts import make_augs as script
    equal = []
    monkeypatch.setattr(script, 'blend', lambda image, other, rng: (equal.append((image == other).all()), image)[1])
    make_augs(monkeypatch, tmp_path, '--dataset', 'digits', '--max_samples', '20', '--per_class', '2', '--patches', '2')
    assert len(equal) >= 20 and not any(equal)


@pytest.mark.parametrize('arguments, words', [
    (['--per_class', '0'], '--per_class: found .0.'), (['--patches', '1'], '--patches: found .1.'),
    (['--patches', '9'], '--patches 9')])
def test_make_augs_refuses(monkeypatch, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        make_augs(monkeypatch, tmp_path, '--dataset', 'digits', *arguments)
    assert not list(tmp_path.iterdir())

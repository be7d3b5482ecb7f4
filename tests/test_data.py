"The digits, downloads, and folders of images, whole and damaged"
import http.server, io, os, shutil, signal, tarfile, threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pytest, torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import Flip, Image, Path, URLs, get_image_files
from sklearn.datasets import load_digits

from fastai_nadam.tools import data as module
from fastai_nadam.tools.data import (check_images, data_path, digits_path, download, get_dls, image_dls, list_images,
    write_digits)

@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder for fastai's data sets"
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    fastai_cfg.cache_clear()
    yield tmp_path/'home'
    fastai_cfg.cache_clear()

@pytest.fixture
def folder(tmp_path):
    "A folder with two classes, eight images to train on and four to validate with in each"
    path = tmp_path/'pets'
    for split,n in dict(train=8, val=4).items():
        for c in ('cat', 'dog'):
            (path/split/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.random.randint(0, 256, (20, 30, 3), dtype=np.uint8)).save(path/split/c/f'{i}.png')
    return path

def files_below(path): return sorted(str(f.relative_to(path)) for f in path.rglob('*') if f.is_file())

def test_digits_are_scikit_learns(tmp_path):
    write_digits(tmp_path/'digits')
    bunch, n = load_digits(), [0]*10
    files = {int(f.stem): f for f in get_image_files(tmp_path/'digits')}
    assert sorted(files) == list(range(1797))
    for i,(im,c) in enumerate(zip(bunch.images, bunch.target)):
        f = files[i]
        split = 'val' if n[c]%5 == 4 else 'train'
        n[c] += 1
        assert f.relative_to(tmp_path/'digits') == Path(split)/str(c)/f.name
        img = Image.open(f)
        assert img.format == 'PNG' and img.mode == 'L'
        assert np.abs(np.asarray(img, dtype=float)*16/255 - im).max() < 0.04  # 8 bits for 17 shades

def test_digits_are_written_once(home):
    "Also by commands that start at the same time"
    fastai_cfg() # which fastai writes itself, and not whole
    with ThreadPoolExecutor(4) as ex: path, = set(ex.map(lambda _: digits_path(), range(4)))
    assert [o.name for o in (home/'data').iterdir()] == ['sklearn_digits']
    before = {f: f.stat().st_mtime_ns for f in get_image_files(path)}
    assert data_path('digits') == path and len(before) == 1797
    assert {f: f.stat().st_mtime_ns for f in get_image_files(path)} == before

def test_digits_interrupted(home, monkeypatch):
    def half(path):
        (path/'train').mkdir(parents=True)
        raise KeyboardInterrupt
    monkeypatch.setattr(module, 'write_digits', half)
    with pytest.raises(KeyboardInterrupt): digits_path()
    assert list((home/'data').iterdir()) == []

class Server(http.server.BaseHTTPRequestHandler):
    "Serves `reply`, of which it says that it has `length` bytes"
    status, reply, length = 200, b'', 0
    def do_GET(self):
        self.send_response(self.status)
        self.send_header('Content-Length', str(self.length))
        self.end_headers()
        self.wfile.write(self.reply)
    def log_message(self, *args): pass

@pytest.fixture
def server(home, monkeypatch):
    "A server that stands for the one of Imagenette"
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(URLs, 'IMAGENETTE_320', f'http://127.0.0.1:{httpd.server_port}/imagenette2-320.tgz')
    def serve(reply, status=200, length=None):
        Server.reply, Server.status, Server.length = reply, status, len(reply) if length is None else length
    yield serve
    httpd.shutdown()
    httpd.server_close()

@pytest.fixture
def archive(folder):
    "`folder` packed as Imagenette is"
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w:gz') as tar: tar.add(folder, 'imagenette2-320')
    return f.getvalue()

def test_download_after_failures(server, archive, home, folder, capsys):
    bad = {'not found': dict(reply=b'gone', status=404),
        'broken off': dict(reply=archive[:len(archive)//2], length=len(archive))}
    for name,kw in bad.items():
        server(**kw)
        with pytest.raises(OSError, match='^cannot download imagenette from http://127.0.0.1'): data_path('imagenette')
        assert not (home/'data'/'imagenette2-320').exists(), name
        assert not (home/'archive'/'imagenette2-320.tgz').exists(), name
    server(archive)
    capsys.readouterr()
    path = data_path('imagenette')
    assert capsys.readouterr().out == f'Downloading imagenette from {URLs.IMAGENETTE_320}\n'
    assert files_below(path) == files_below(folder)
    assert [o.name for o in (home/'data').iterdir()] == ['imagenette2-320']
    server(b'gone', status=404)
    assert data_path('imagenette') == path  # from now on it is there
    assert capsys.readouterr().out == ''

def test_download_interrupted_while_unpacking(server, archive, home, monkeypatch):
    server(archive)
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(shutil, 'move', interrupted)
        with pytest.raises(KeyboardInterrupt): download('imagenette')
    assert list((home/'data').iterdir()) == []
    assert len(get_image_files(download('imagenette'))) == 24

def test_folder(folder):
    files = list_images(folder)
    want = [f'{s}/{c}/{i}.png' for s,n in (('train', 8), ('val', 4)) for c in ('cat', 'dog') for i in range(n)]
    assert [str(f.relative_to(folder)) for f in files] == want
    check_images(files)
    (folder/'val').rename(folder/'valid')
    dls = image_dls(list_images(str(folder)), size=16, bs=4, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds), list(dls.vocab)) == (16, 8, ['cat', 'dog'])
    assert [f.parent.parent.name for f in dls.valid_ds.items] == ['valid']*8
    assert list(dls.train_ds.items) == sorted(dls.train_ds.items) and dls.path == folder
    assert dls.one_batch()[0].shape == (4, 3, 16, 16)

def test_what_is_not_used_is_not_read(folder):
    before = list_images(folder)
    for f in ('notes/a.png', 'train/.trash/a.png', 'train/cat/deep/a.png', 'train/a.png', 'valid/dog/a.png'):
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        (folder/f).write_bytes(b'no image')
    assert list(list_images(folder)) == list(before)
    check_images(list_images(folder))
    assert len(get_dls(folder, size=8, bs=4).valid_ds) == 8

@pytest.fixture
def in_time():
    "A test that hangs fails"
    def late(*_): raise AssertionError('it hangs')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

@pytest.mark.skipif(not hasattr(signal, 'SIGALRM'), reason='no alarm here')
def test_only_files_two_levels_down_are_listed(folder, in_time):
    "Links in a circle, pipes, folders called as images, links to nowhere and to themselves are passed over"
    before, cat = list(list_images(folder)), folder/'train'/'cat'
    links = (('train/cat/up', '..'), ('train/dog/up', '..'), ('train/cat/all', folder), ('train/more', 'more'),
            ('val/up', '..'), ('val/cat/up.png', '..'), ('train/cat/no.png', 'nowhere'),
            ('train/cat/self.png', 'self.png'), ('val/dog/null.png', os.devnull), ('notes', '.'))
    for at,to in links: (folder/at).symlink_to(to)
    os.mkfifo(cat/'x.png')
    os.mkfifo(folder/'train'/'x.png')
    (cat/'folder.png').mkdir()
    assert list(list_images(folder)) == before
    check_images(list_images(folder))

def test_links_to_images_are_followed(folder, tmp_path):
    "Of an image, and of all images of a class"
    before = list_images(folder)
    (folder/'train'/'cat'/'0.png').rename(tmp_path/'other.png')
    (folder/'train'/'cat'/'0.png').symlink_to(tmp_path/'other.png')
    (folder/'val'/'dog').rename(tmp_path/'dogs')
    (folder/'val'/'dog').symlink_to(tmp_path/'dogs')
    assert list(list_images(folder)) == list(before)
    check_images(list_images(folder))

@pytest.mark.parametrize('name', ['train', 'val', 'valid'])
def test_a_folder_that_is_itself_called(name, folder, tmp_path):
    root = tmp_path/name
    folder.rename(root)
    shutil.copy(root/'train'/'cat'/'0.png', root/'train'/'0.png')  # of no class
    shutil.copy(root/'train'/'cat'/'0.png', root/'val'/'0.png')
    dls = get_dls(root, size=8, bs=4)
    assert list(dls.vocab) == ['cat', 'dog'] and (len(dls.train_ds), len(dls.valid_ds)) == (16, 8)

def break_png(f): f.write_bytes(f.read_bytes()[:len(f.read_bytes())//2])

@pytest.mark.parametrize('damage,message', [
    (shutil.rmtree, "no such folder: '{}'"),
    (lambda p: (p/'train').rename(p/'training'), "'{}' has no folder 'train'"),
    (lambda p: shutil.rmtree(p/'val'), "'{}' has no folder 'val'"),
    (lambda p: shutil.rmtree(p/'train'/'cat'), "'{}/train' has images of 1 class; two or more are needed"),
    (lambda p: [f.unlink() for f in (p/'train').rglob('*.png')], "'{}/train' has images of 0 classes"),
    (lambda p: (p/'val'/'cat').rename(p/'val'/'Cat'), "['Cat', 'cat'] are in one of them only"),
    (lambda p: break_png(p/'val'/'dog'/'2.png'), "cannot read the image '{}/val/dog/2.png'"),
    (lambda p: (p/'train'/'cat'/'3.jpg').write_text('no image'), "cannot read the image '{}/train/cat/3.jpg'"),
    (lambda p: [(p/'train'/'cat'/f'{i}.png').write_bytes(b'') for i in (1, 2, 3)],
        "cannot read the image '{}/train/cat/1.png' and 2 more"),
], ids=['none', 'train', 'val', 'one class', 'empty', 'other class', 'half an image', 'no image', 'three images'])
def test_folder_damaged(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError) as e: check_images(list_images(folder))
    assert message.format(folder) in str(e.value)

@pytest.mark.parametrize('kw,message', [(dict(size=0), 'size must be a whole number from 1, got 0'),
    (dict(size=1.5), 'got 1.5'),
    (dict(bs=0), 'bs must be a whole number from 1, got 0'), (dict(bs=True), 'got True'),
    (dict(bs=17), 'bs must be at most the number of training images, 16, got 17')])
def test_numbers_refused(folder, kw, message):
    with pytest.raises(ValueError, match=message):
        image_dls(list_images(folder), **{**dict(size=8, bs=4, num_workers=0), **kw})

def test_transforms(folder):
    digits, photos = get_dls('digits', size=12), get_dls(folder, size=12, bs=4)
    def has_flip(dls): return any(isinstance(t, Flip) for t in dls.after_batch.fs)
    assert has_flip(photos) and not has_flip(digits)
    x = torch.Tensor(digits.valid.one_batch()[0])
    img = torch.tensor(np.asarray(Image.open(digits.valid_ds.items[0]).convert('RGB'))/255)
    img = img.permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(o)[:,None,None] for o in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    want = (torch.nn.functional.interpolate(img, size=(12, 12), mode='bilinear', align_corners=True) - mean)/std
    assert torch.allclose(x[:1], want, atol=1e-4)  # the whole digit, not turned
    assert (len(digits.train_ds), len(digits.valid_ds), len(digits.train)) == (1442, 355, 1442//64)

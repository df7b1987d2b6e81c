"""Model definitions by family, imported when used."""

FAMILIES = {
    "llama": "arkinfer.models.llama:Llama",
    "minicpm": "arkinfer.models.minicpm:MiniCPM",
    "qwen3": "arkinfer.models.qwen3:Qwen3",
}

"""What WhatsApp writes into an export in place of something, in the languages of phones."""

import re

MARKS = "\u200e\u200f\u202a\u202b\u202c"  # directions of writing, which iPhones put before lines
DELETED = {
    "This message was deleted",
    "You deleted this message",
    "Diese Nachricht wurde gelöscht",
    "Du hast diese Nachricht gelöscht",
    "Eliminaste este mensaje",
    "Se eliminó este mensaje",
    "Ce message a été supprimé",
    "Vous avez supprimé ce message",
    "Mensagem apagada",
    "Esta mensagem foi apagada",
    "Você apagou esta mensagem",
    "Apagou esta mensagem",
    "Questo messaggio è stato eliminato",
    "Hai eliminato questo messaggio",
    "Dit bericht is verwijderd",
    "U hebt dit bericht verwijderd",
    "Je hebt dit bericht verwijderd",
    "Данное сообщение удалено",
    "Вы удалили данное сообщение",
    "Ta wiadomość została usunięta",
    "Usunięto tę wiadomość",
    "Bu mesaj silindi",
    "Bu mesajı sildiniz",
    "Detta meddelande raderades",
    "Du raderade detta meddelande",
    "Denne besked blev slettet",
    "Denne meldingen ble slettet",
    "Tämä viesti poistettiin",
    "Tato zpráva byla smazána",
    "Acest mesaj a fost șters",
    "このメッセージは削除されました",
    "此消息已被删除",
    "此訊息已刪除",
    "삭제된 메시지입니다",
}
# One-time views and calls, of which an export has no text; what has not arrived yet.
NOTHING = {"null", "Waiting for this message. This may take a while"}
_EDIT = "edit|bearbeitet|modifi|bewerkt|изменен|edyt|düzenle|redig|muokat|uprav|編集|编辑|編輯|수정"
EDITED = re.compile(rf" ?(?:[{MARKS}]+<[^<>\n:]*>|<[^<>\n]*(?:{_EDIT})[^<>\n]*>)$", re.IGNORECASE)
# Whole texts in place of what an export leaves out: Android's stand in <>, iPhones' behind U+200E.
LEFT_OUT = re.compile(r"^<[^<>]*>$")
# The same above a caption: in two words and more, which no tag of a person has.
_OMITTED = re.compile(r"^<[^\W\d_]+(?: [^\W\d_]+)+>\n")
_KINDS = (
    "jpe?g|png|gif|webp|heic|bmp|mp4|mov|3gp|mkv|opus|ogg|m4a|mp3|aac|amr|wav|pdf|docx?|xlsx?|pptx?|"
    "odt|ods|txt|csv|rtf|zip|rar|7z|vcf|apk|html?|epub|json"
)
_WORDS = "attached|angehängt|adjunto|joint|anexado|allegato|bijgevoegd|добавлен|załączono|eklendi"
_ATTACHED = re.compile(
    rf"^(?:[{MARKS}]+[^\n]{{1,200}}?|\S{{1,200}}?)\.(?:{_KINDS}) \([^()\n]*\)(?:\n|$)"
    rf"|^[^\n]{{1,200}}?\.\w{{2,5}} \([^()\n]*(?:{_WORDS})[^()\n]*\)(?:\n|$)",
    re.IGNORECASE,
)
_ATTACHED_BEHIND = re.compile(
    rf"[ \n]?[{MARKS}]*<[^<>\n]*: [^<>\n]*\.(?:{_KINDS})>$", re.IGNORECASE
)


def without_attachment(text: str) -> str:
    """What a person wrote with a file: its caption, "" where there is none."""
    for place in (_ATTACHED, _ATTACHED_BEHIND, _OMITTED):
        text = place.sub("", text, count=1)
    return text
